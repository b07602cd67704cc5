"""Measuring an image without any EPC: its regions go through the hashers, nothing is ever materialised.

Threads own disjoint hash domains and each walks the same parts (:mod:`enturbo.workers.parts`) on its own, so
they never wait for each other; hashers give the GIL back. A thread needs a few MiB, whatever the size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from ..shm.dtypes import EPCM_DTYPE
from ..shm.layout import MAX_BLOCK, MAX_DOMAINS, PAGE_SIZE
from . import records
from .parts import DataPart, EaddPart, FillPart, StreamRegion, parts
from .sha256 import Chain, EaddSpan, Hasher, Pages, Span, get_hasher

FILL_BATCH: Final = 512  # pages of one domain in a call
ALONE: Final = 512  # pages; below this, threads cost more than they save


def measure_stream(
    ssa_frame_size: int,
    size: int,
    regions: Sequence[StreamRegion],
    *,
    scheme: str = "enturbo",
    domains: int = MAX_DOMAINS,
    block: int = 16,
    workers: int = 0,
    hasher: str | Hasher | None = None,
) -> bytes:
    """MRENCLAVE, 32 bytes, of an image whose pages are added region by region.

    ``ssa_frame_size`` in pages, ``size`` (SECS.SIZE) in bytes; ``domains`` and ``block`` are D and B of
    scheme ``enturbo`` and no part of ``sgx``; ``workers`` threads, 0: the usable cores. Raises ValueError for
    an unknown scheme, odd parameters or an impossible region, EnturboError for an unknown hasher.
    """
    opening = records.ecreate(ssa_frame_size, size)
    if scheme == "sgx":
        # One domain: how its pages are cut into blocks is of no account.
        return stream_digests(regions, [opening], MAX_BLOCK, workers=workers, hasher=hasher)[0]
    if scheme != "enturbo":
        raise ValueError(f"scheme is enturbo or sgx, got {scheme!r}")
    digests = domain_digests(regions, domains, block, workers=workers, hasher=hasher)
    page_count = sum(region.page_count for region in regions)
    return records.merge(opening, page_count, domains, block, digests)


def domain_digests(
    regions: Sequence[StreamRegion],
    domains: int,
    block: int,
    *,
    workers: int = 0,
    hasher: str | Hasher | None = None,
) -> list[bytes]:
    """The digests h_0 .. h_{D-1} of scheme ``enturbo``."""
    openings = [records.hashdom(domain, domains, block) for domain in range(domains)]
    records.check_scheme_params(domains, block)
    return stream_digests(regions, openings, block, workers=workers, hasher=hasher)


def stream_digests(
    regions: Sequence[StreamRegion],
    openings: Sequence[bytes],
    block: int,
    *,
    workers: int = 0,
    hasher: str | Hasher | None = None,
) -> list[bytes]:
    """The digests of streams that open with ``openings`` and share the pages by blocks of ``block``."""
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if hasher is None or isinstance(hasher, str):
        hasher = get_hasher(hasher)
    domains = len(openings)
    workers = workers or len(os.sched_getaffinity(0))
    if sum(region.page_count for region in regions) < ALONE:
        workers = 1
    shares = _shares(domains, workers, hasher.lanes)
    jobs = [_Job(hasher, regions, share, openings, block) for share in shares]
    if len(jobs) == 1:
        found = [jobs[0].run()]
    else:
        with ThreadPoolExecutor(len(jobs), "enturbo-measure") as executor:
            found = list(executor.map(_Job.run, jobs))
    digests = {domain: digest for share in found for domain, digest in share.items()}
    return [digests[domain] for domain in range(domains)]


def _shares(domains: int, workers: int, lanes: int) -> list[list[int]]:
    """Each thread's domains: neighbours together as long as there are enough for all threads."""
    width = max(1, min(lanes, domains // workers))
    units = [range(first, min(first + width, domains)) for first in range(0, domains, width)]
    count = min(workers, len(units))
    return [[domain for unit in units[share::count] for domain in unit] for share in range(count)]


class _Reach(NamedTuple):
    """A domain's pages in a part, as numbers within the domain: ``start`` .. ``stop`` - 1."""

    chain: Chain
    domain: int
    start: int
    stop: int


class _Job:
    """One thread's share: its domains' chains, taken through all parts."""

    def __init__(
        self,
        hasher: Hasher,
        regions: Sequence[StreamRegion],
        share: Sequence[int],
        openings: Sequence[bytes],
        block: int,
    ) -> None:
        self.hasher, self.regions, self.block, self.domains = hasher, regions, block, len(openings)
        self.chains: dict[int, Chain] = {}
        for domain in share:
            chain = self.chains[domain] = hasher.start()
            chain.update(openings[domain])
        self._fill = (-1, b"")

    def run(self) -> dict[int, bytes]:
        """Domain -> digest."""
        for part in parts(self.regions):
            reaches = list(self._reaches(part.first, part.page_count))
            match part:
                case _ if not reaches:
                    pass
                case EaddPart():
                    self._eadds(part, reaches)
                case FillPart():
                    self._fills(part, reaches)
                case DataPart():
                    self._data(part, reaches)
        return {domain: chain.digest() for domain, chain in self.chains.items()}

    def _rank(self, page: int, domain: int) -> int:
        """How many pages of ``domain`` stand before ``page`` in the stream."""
        stripes, rest = divmod(page, self.block * self.domains)
        return stripes * self.block + min(max(rest - domain * self.block, 0), self.block)

    def _page(self, rank: int, domain: int) -> int:
        """The place in the stream of the page number ``rank`` of ``domain``."""
        return (rank // self.block * self.domains + domain) * self.block + rank % self.block

    def _reaches(self, first: int, count: int) -> Iterator[_Reach]:
        for domain, chain in self.chains.items():
            start, stop = self._rank(first, domain), self._rank(first + count, domain)
            if start < stop:
                yield _Reach(chain, domain, start, stop)

    def _walks(self, reaches: Iterable[_Reach]) -> Iterator[list[tuple[Chain, tuple[int, ...]]]]:
        """(chain, (first, block, stride, blocks, end)) for each reach: first the rest of a block, then all.

        Only the domain in whose block a part begins has such a remainder; the whole blocks go in one call.
        """
        leads: list[tuple[Chain, tuple[int, ...]]] = []
        whole: list[tuple[Chain, tuple[int, ...]]] = []
        for chain, domain, start, stop in reaches:
            head = min(-start % self.block, stop - start)
            if head:
                page = self._page(start, domain)
                leads.append((chain, (page, head, head, 1, page + head)))
            if start + head < stop:
                first, end = self._page(start + head, domain), self._page(stop - 1, domain) + 1
                blocks = -(-(stop - start - head) // self.block)
                whole.append((chain, (first, self.block, self.block * self.domains, blocks, end)))
        yield from filter(None, (leads, whole))

    def _eadds(self, part: EaddPart, reaches: Sequence[_Reach]) -> None:
        for walk in self._walks(reaches):
            chains = [chain for chain, _ in walk]
            base = part.linear - part.first
            self.hasher.extend_eadd(chains, [EaddSpan(base, part.flags, *numbers) for _, numbers in walk])

    def _data(self, part: DataPart, reaches: Sequence[_Reach]) -> None:
        for walk in self._walks(reaches):
            spans = [
                Span(part.pages, first - part.first, block, stride, blocks, end - part.first)
                for _, (first, block, stride, blocks, end) in walk
            ]
            self.hasher.extend([chain for chain, _ in walk], spans)

    def _fills(self, part: FillPart, reaches: Sequence[_Reach]) -> None:
        """All pages have the same bytes, so each domain gets entries of its own over one shared buffer."""
        data = self._fill_data(part.fill)
        for at in range(0, max(reach.stop - reach.start for reach in reaches), FILL_BATCH):
            chains: list[Chain] = []
            spans: list[Span] = []
            for chain, domain, start, stop in reaches:
                ranks = np.arange(start + at, min(start + at + FILL_BATCH, stop), dtype=np.int64)
                if not (count := len(ranks)):
                    continue
                pages = (ranks // self.block * self.domains + domain) * self.block + ranks % self.block
                entries = np.zeros(count, EPCM_DTYPE)
                entries["flags"], entries["chunks"] = part.flags, part.chunks
                entries["linear"] = pages + (part.linear - part.first)
                chains.append(chain)
                spans.append(Span(Pages(entries.data, data), 0, count, count, 1, count))
            self.hasher.extend(chains, spans)

    def _fill_data(self, fill: int) -> bytes:
        if self._fill[0] != fill:
            self._fill = (fill, fill.to_bytes(4, "little") * (FILL_BATCH * PAGE_SIZE // 4))
        return self._fill[1]
