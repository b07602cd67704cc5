"""A thread's share of an image that is measured by hash domains (scheme ``enturbo``).

The domains of one image share its pages by blocks, so a thread walks the image's parts once
(:mod:`enturbo.workers.parts`) and gives each to all its domains: one image fills every lane of the hasher.
Shares of one image know nothing of each other and may run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from ..shm.dtypes import EPCM_DTYPE
from ..shm.layout import PAGE_SIZE
from .parts import DataPart, EaddPart, FillPart, StreamRegion, parts
from .sha256 import Chain, EaddSpan, Hasher, Pages, Span

FILL_BATCH: Final = 512  # pages of one chain in a call


class FillPages:
    """``FILL_BATCH`` pages that repeat one u32, kept until another one is asked for."""

    def __init__(self) -> None:
        self._made = (-1, b"")

    def of(self, fill: int) -> bytes:
        """The pages that repeat ``fill``."""
        if self._made[0] != fill:
            self._made = (fill, fill.to_bytes(4, "little") * (FILL_BATCH * PAGE_SIZE // 4))
        return self._made[1]


def cut(domains: int, threads: int, lanes: int) -> list[list[int]]:
    """Each thread's domains: neighbours together as long as there are enough for all threads."""
    width = max(1, min(lanes, domains // threads))
    units = [range(first, min(first + width, domains)) for first in range(0, domains, width)]
    count = min(threads, len(units))
    return [[domain for unit in units[share::count] for domain in unit] for share in range(count)]


class _Reach(NamedTuple):
    """A domain's pages in a part, as numbers within the domain: ``start`` .. ``stop`` - 1."""

    chain: Chain
    domain: int
    start: int
    stop: int


class Share:
    """Some domains of an image, whose chains open with ``openings``, taken through all its parts."""

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
        self._fill_pages = FillPages()

    def run(self) -> dict[int, bytes]:
        """Domain -> digest. Raises ValueError for an impossible region."""
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
        data = self._fill_pages.of(part.fill)
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
