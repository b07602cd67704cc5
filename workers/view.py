"""A launch as one measurer sees it: where the pages of a pair stand, and how far everybody is.

Pages are striped over the domains by blocks, so the blocks of a domain recur at a stride of D * B pages, and
the two blocks of a pair are neighbours. A *row* of a pair is one block of each of its domains: 2 * B pages
that follow each other. Where a claim covers several pairs (``group``), "pair" means all of them, and its rows
are that much wider.

    page   0      B      2B     3B            D*B
           | d 0  | d 1  | d 2  | d 3  | …     | d 0  | d 1  | …
           |<- pair 0 -->|<- pair 1 -->|       |<- pair 0, row 1
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ..shm.epcm import Rows
from ..shm.launches import Launch
from ..shm.layout import COPY_BY_HOST, COPY_FUSED, EPCM_ENTRY, SCHEME_SGX
from ..shm.memory import Memory
from . import records
from .sha256 import Chain, Pages, Span

if TYPE_CHECKING:
    from .filling import Source

STRIPE_PAGES: Final = 256  # pages of one domain hashed in one claim; about 1 ms for a pair of lanes
CHAIN_PAGES: Final = 512  # the same where there is one domain: nobody else could take a part of it

Order = list[tuple[int, bool]]


class Outcome(enum.Enum):
    """What one step of a measurer came to."""

    WORKED = "worked"  # some pages were measured, copied, scrubbed, or released for a dead holder
    WAITING = "waiting"  # the next pages are not VALID
    BUSY = "busy"  # others hold all that is left
    FINISHED = "finished"  # all pages of all domains are released
    GONE = "gone"  # the launch is closed, or its copy was aborted
    FAULT = "fault"  # the launch must be rejected: see enturbo.shm.layout.FAULT_SMC and FAULT_SOURCE


class OnSpan(Protocol):
    """Told about each stripe: SPAN (measured) or COPIED (or BLIND), pages, CLOCK_MONOTONIC ns, and whether
    the pair is
    finished."""

    def __call__(
        self, kind: int, slot: int, generation: int, pages: int, start: int, end: int, finished: bool
    ) -> None: ...


def block_totals(launch: Launch) -> list[int]:
    """Blocks of each domain: block b of the image belongs to domain b mod D."""
    each, more = divmod(-(-launch.page_count // launch.block), launch.domains)
    return [each + 1] * more + [each] * (launch.domains - more)


def filled_rows(launch: Launch) -> list[int]:
    """Rows of each claim: the blocks of its first domain, which never has fewer than the others."""
    return block_totals(launch)[:: launch.claim_domains]


@functools.lru_cache(maxsize=1024)
def hashdom(domain: int, domains: int, block: int) -> bytes:
    """:func:`enturbo.workers.records.hashdom`, remembered."""
    return records.hashdom(domain, domains, block)


def prefix(launch: Launch, domain: int) -> bytes:
    """The record with which the domain's stream begins."""
    if launch.scheme == SCHEME_SGX:
        return records.ecreate(launch.ssa_frame_size, launch.size)
    return hashdom(domain, launch.domains, launch.block)


class View:
    """Geometry of a launch, the chains that its measurer has cached, and what is known to be finished."""

    def __init__(self, memory: Memory, slot: int, launch: Launch) -> None:
        self.slot, self.launch, self.generation = slot, launch, launch.generation
        self.smc = memory.launches.smc(slot)
        self.copied = memory.launches.copied[slot, : launch.claims]
        self.stride = launch.domains * launch.block  # pages from a row to the next
        self.totals = block_totals(launch)
        first, count, size = launch.first_page, launch.page_count, EPCM_ENTRY.size
        self.pages = Pages(
            memory.epcm.buffer[first * size : (first + count) * size], memory.epc.pages(first, count)
        )
        self.chains: dict[int, tuple[int, Chain]] = {}
        self.stripe = max(1, (STRIPE_PAGES if launch.domains > 1 else CHAIN_PAGES) // launch.block)
        self.width = launch.claim_domains
        self.pair_rows = filled_rows(launch)
        self.pair_totals = [
            sum(self.totals[first : first + self.width]) for first in range(0, launch.domains, self.width)
        ]
        self.finished = [total == 0 for total in self.pair_totals]  # settled when the launch was opened
        # The EPC pages that are released last, by pair: those of domains that have any.
        ends = np.array(
            [self.block_end(d, total - 1) for d, total in enumerate(self.totals) if total], np.int64
        )
        self.last_pages = [
            ends[pair * self.width : (pair + 1) * self.width] + (first - 1) for pair in range(launch.claims)
        ]
        self._rows: dict[tuple[int, int], Rows] = {}
        self.fused = launch.copy_mode == COPY_FUSED
        self.filled = launch.copy_mode == COPY_BY_HOST  # nothing is left for holders of claims to copy
        self.can_fill = True  # until a file of the image turns out to be out of reach
        # The files that something was copied from, by the host's descriptors, which mean the same as long as
        # anything is to be copied: see enturbo.workers.filling.Sources.
        self.sources: dict[int, Source] = {}

    def domains(self, pair: int) -> range:
        """The domains of ``pair``: two, one where D is 1, more where claims cover several pairs."""
        return range(pair * self.width, (pair + 1) * self.width)

    def block_start(self, domain: int, block: int) -> int:
        """Index, within the image, of the first page of the domain's ``block``-th block."""
        return (block * self.launch.domains + domain) * self.launch.block

    def block_end(self, domain: int, block: int) -> int:
        """Index past the last page of that block."""
        return min(self.block_start(domain, block) + self.launch.block, self.launch.page_count)

    def row_of(self, pair: int, row: int) -> tuple[int, int]:
        """First page of a row of ``pair``, within the image, and how many there are."""
        first = self.block_start(pair * self.width, row)
        return first, min(self.launch.block * self.width, self.launch.page_count - first)

    def row_with(self, page: int) -> tuple[int, int]:
        """The pair, and which of its rows, that the image's page ``page`` belongs to."""
        domain = page // self.launch.block % self.launch.domains
        return domain // self.width, page // self.stride

    def rows(self, first_domain: int, domains: int) -> Rows:
        """The blocks of ``domains`` neighbouring domains, as EPC pages."""
        key = first_domain, domains
        rows = self._rows.get(key)
        if rows is None:
            launch = self.launch
            rows = self._rows[key] = Rows(
                launch.first_page,
                self.stride,
                first_domain * launch.block,
                domains * launch.block,
                launch.page_count // self.stride,
                launch.first_page + launch.page_count,
            )
        return rows

    def stripe_from(self, block: int, total: int) -> int:
        """Blocks of a domain to hash in one claim, from ``block`` on.

        A claim costs some 5 % of a stripe, so claims grow: where an enclave waits for releases, after its
        first blocks, up to two stripes; where nobody waits for single releases, up to four. The last ones
        are short, so that all measurers end at the same time.
        """
        most = 4 * self.stripe if self.fused else min(2 * self.stripe, block)
        return max(self.stripe, min(most, (total - block) // 2))

    def span(self, domain: int, start: int, count: int) -> Span:
        """``count`` blocks of a domain, for the hasher."""
        first, launch = self.block_start(domain, start), self.launch
        return Span(self.pages, first, launch.block, self.stride, count, launch.page_count)

    def page_total(self, domain: int, start: int, count: int) -> int:
        """Pages in these blocks."""
        if not count:
            return 0
        last = start + count - 1
        return (count - 1) * self.launch.block + self.block_end(domain, last) - self.block_start(domain, last)

    def is_through(self, pair: int) -> bool:
        """Whether all results of ``pair`` were there when somebody began to release what they cover."""
        first = pair * self.width
        released = self.smc.released[first : first + self.width].tolist()
        return bool(released == self.totals[first : first + self.width])

    def order(self) -> Order:
        """Pairs not known to be finished, the one with the least progress first; True: it may be by now."""
        # Plain integers: for sixteen of them numpy's calls cost more than they save.
        released = self.smc.released.tolist()
        width = self.width
        progress = [sum(released[first : first + width]) for first in range(0, self.launch.domains, width)]
        pairs = [pair for pair in range(len(progress)) if not self.finished[pair]]
        pairs.sort(key=progress.__getitem__)
        return [(pair, progress[pair] == self.pair_totals[pair]) for pair in pairs]

    def unfilled(self) -> list[int]:
        """Pairs of which rows are still to be copied (or scrubbed), the one with the fewest done first."""
        copied = self.copied.tolist()
        pairs = [pair for pair, rows in enumerate(self.pair_rows) if copied[pair] < rows]
        pairs.sort(key=copied.__getitem__)
        return pairs
