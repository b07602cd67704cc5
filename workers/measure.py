"""Measuring launches in the EPC: claim a pair of hash domains, hash a stripe, publish, release.

Workers and the host run this same code, each with claims on a description of its own. One
:meth:`Measurer.step` measures one stripe:

    choose the pair with the least progress whose next pages are VALID
    claim it -> look at the generation again -> take over: newest result of each domain, release what it
    covers -> hash the next blocks of both domains in two lanes -> publish results -> raise blocks released
    -> release the pages -> give the claim back

Nothing here waits while holding a claim, with one exception: a hasher that cannot export midstates keeps a
pair until its digests are final, and leaves when the launch closes.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from ..shm.launches import Claims, Launch
from ..shm.layout import EPCM_ENTRY, HOST_WORKER, SCHEME_SGX
from ..shm.memory import Memory
from ..shm.smc import Result
from . import records
from .sha256 import Chain, Hasher, Pages, Span

STRIPE_PAGES: Final = 256  # pages of one domain hashed in one claim; about 1 ms for a pair of lanes
CHAIN_PAGES: Final = 512  # the same where there is one domain: nobody else could take a part of it
_LAST: Final = np.iinfo(np.int64).max  # sorts behind every progress


class Outcome(enum.Enum):
    """What one step came to."""

    WORKED = "worked"  # some blocks were measured, or released for a dead holder
    WAITING = "waiting"  # the next pages are not VALID
    BUSY = "busy"  # others hold all that is left
    FINISHED = "finished"  # all pages of all domains are released
    GONE = "gone"  # the launch is closed, or its copy was aborted
    FAULT = "fault"  # a result covers less than what was released: the launch must be rejected


class OnSpan(Protocol):
    """Told about each measured stripe: pages, CLOCK_MONOTONIC ns, and whether the pair is finished."""

    def __call__(
        self, slot: int, generation: int, pages: int, start: int, end: int, finished: bool
    ) -> None: ...


class _Domain(NamedTuple):
    """One domain that this measurer holds: its newest result and the chain that continues it."""

    number: int
    newest: Result | None
    chain: Chain | None  # None: the result is final
    blocks: int  # included in the chain


def block_totals(launch: Launch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Blocks of each domain: block b of the image belongs to domain b mod D."""
    blocks = -(-launch.page_count // launch.block)
    return (blocks + np.arange(launch.domains - 1, -1, -1, dtype=np.int64)) // launch.domains


def settled(launch: Launch) -> dict[int, bytes]:
    """The digests of the domains without pages: that of their first record alone.

    The host stores them when it opens the launch, so nobody claims a domain to hash nothing.
    """
    empty = max(0, launch.domains + launch.page_count // -launch.block)
    return {
        domain: _empty_digest(prefix(launch, domain))
        for domain in range(launch.domains - empty, launch.domains)
    }


@functools.lru_cache(maxsize=1024)
def _empty_digest(record: bytes) -> bytes:
    return hashlib.sha256(record).digest()


def prefix(launch: Launch, domain: int) -> bytes:
    """The record with which the domain's stream begins."""
    if launch.scheme == SCHEME_SGX:
        return records.ecreate(launch.ssa_frame_size, launch.size)
    return records.hashdom(domain, launch.domains, launch.block)


class View:
    """A launch as one measurer sees it: geometry, cached chains, pairs known to be finished."""

    def __init__(self, memory: Memory, slot: int, launch: Launch) -> None:
        self.slot, self.launch, self.generation = slot, launch, launch.generation
        self.smc = memory.launches.smc(slot)
        self.totals = block_totals(launch)
        first, count = launch.first_page, launch.page_count
        size = EPCM_ENTRY.size
        self.pages = Pages(
            memory.epcm.buffer[first * size : (first + count) * size], memory.epc.pages(first, count)
        )
        self.chains: dict[int, tuple[int, Chain]] = {}
        self.stripe = max(1, (STRIPE_PAGES if launch.domains > 1 else CHAIN_PAGES) // launch.block)
        self.pair_totals = self.totals.reshape(launch.pairs, -1).sum(1)
        self.finished = self.pair_totals == 0  # settled when the launch was opened

    def domains(self, pair: int) -> range:
        """The domains of ``pair``: two, or one where D is 1."""
        return range(2 * pair, min(2 * pair + 2, self.launch.domains))

    def block_start(self, domain: int, block: int) -> int:
        """Index, within the image, of the first page of the domain's ``block``-th block."""
        return (block * self.launch.domains + domain) * self.launch.block

    def block_end(self, domain: int, block: int) -> int:
        """Index past the last page of that block."""
        return min(self.block_start(domain, block) + self.launch.block, self.launch.page_count)

    def order(self) -> list[tuple[int, bool]]:
        """Pairs not known to be finished, the one with the least progress first; True: it may be by now."""
        released = self.smc.released[: self.launch.domains]
        progress = released.reshape(self.launch.pairs, -1).sum(1)
        pairs = np.argsort(np.where(self.finished, _LAST, progress), kind="stable")
        left = self.launch.pairs - int(self.finished.sum())
        return list(
            zip(pairs[:left].tolist(), (progress == self.pair_totals)[pairs[:left]].tolist(), strict=True)
        )


class Measurer:
    """One role that measures: a worker, or a thread of the host."""

    def __init__(
        self,
        memory: Memory,
        claims: Claims,
        hasher: Hasher,
        *,
        worker: int = HOST_WORKER,
        incarnation: int = 0,
        on_span: OnSpan | None = None,
        fault: Callable[[str], None] | None = None,
    ) -> None:
        self.memory, self.claims, self.hasher = memory, claims, hasher
        self.worker, self.incarnation = worker, incarnation
        self._on_span = on_span
        self._fault = fault
        self._views: dict[int, View] = {}

    def step(self, slot: int, generation: int) -> Outcome:
        """Measure a stripe of the launch: a part of one pair, or several pairs where each has little left."""
        view = self._view(slot, generation)
        if view is None:
            return Outcome.GONE
        if int(self.memory.launches.fault[slot]) == generation:
            return Outcome.FAULT
        order = [pair for pair, maybe in view.order() if not (maybe and self._is_finished(view, pair))]
        if not order:
            self._views.pop(slot, None)
            return Outcome.FINISHED
        outcome, pages = Outcome.BUSY, 0
        for pair in order:
            if pages >= STRIPE_PAGES:
                break
            if not self._is_ready(view, pair):
                return outcome if outcome is Outcome.WORKED else Outcome.WAITING
            if not self.claims.claim(slot, pair):
                continue
            try:
                outcome, measured = self._work(view, pair)
            finally:
                self.claims.give_back(slot, pair)
            if outcome is not Outcome.WORKED:
                return outcome
            pages += measured
        return outcome

    def forget(self) -> None:
        """Drop cached launches, and with them all views of the shared memory."""
        self._views.clear()

    # ------------------------------------------------------------------ looking for work, no claim held

    def _view(self, slot: int, generation: int) -> View | None:
        table = self.memory.launches
        view = self._views.get(slot)
        if view is None or view.generation != generation:
            launch = table.read(slot)
            # Read twice: a slot that was closed and opened in between is not the one we were told of.
            if launch.generation != generation or int(table.generations[slot]) != generation:
                self._views.pop(slot, None)
                return None
            view = self._views[slot] = View(self.memory, slot, launch)
        if not self._is_open(view):
            self._views.pop(slot, None)
            return None
        return view

    def _is_open(self, view: View) -> bool:
        table = self.memory.launches
        return (
            int(table.generations[view.slot]) == view.generation
            and int(table.copy_aborted[view.slot]) != view.generation
        )

    def _is_finished(self, view: View, pair: int) -> bool:
        """Finished is when the last page of each domain is released, not when its result is final.

        Between the two a worker may die; then another claims the pair to release the rest.
        """
        for domain in view.domains(pair):
            total = int(view.totals[domain])
            if view.smc.blocks_released(domain) != total:
                return False
            if not self._is_block_released(view, domain, total - 1):
                return False
        view.finished[pair] = True
        return True

    def _is_block_released(self, view: View, domain: int, block: int) -> bool:
        if block < 0:  # an empty domain is settled when the launch is opened
            return True
        last = view.launch.first_page + view.block_end(domain, block) - 1
        return self.memory.epcm.is_released(last, view.generation)

    def _is_ready(self, view: View, pair: int) -> bool:
        """Whether any domain of the pair can go on: its next block is VALID, or only releases are left.

        A domain that is finished gives nothing to do: its neighbour may wait for a copy by this very thread.
        """
        for domain in view.domains(pair):
            block, total = view.smc.blocks_released(domain), int(view.totals[domain])
            if block < total:
                if self._is_block_valid(view, domain, block):
                    return True
            elif not self._is_block_released(view, domain, total - 1):
                return True
        return False

    def _is_block_valid(self, view: View, domain: int, block: int) -> bool:
        # The host copies a launch in ascending order, so the last page of a block tells of all of it.
        end = view.block_end(domain, block)
        if int(self.memory.launches.copy_front[view.slot]) >= end:
            return True
        return self.memory.epcm.is_valid(view.launch.first_page + end - 1, view.generation)

    # ------------------------------------------------------------------------- working, the claim is held

    def _work(self, view: View, pair: int) -> tuple[Outcome, int]:
        """A stripe of ``pair``: what it came to, and the pages measured."""
        # The claim may have been waited out by a close: only a generation read *after* taking it counts.
        # Closing takes the whole range, so from here on it waits for this claim.
        if not self._is_open(view):
            return Outcome.GONE, 0
        self._point("claimed")
        held: list[_Domain] = []
        for number in view.domains(pair):
            domain = self._take_over(view, number)
            if domain is None:
                self.memory.launches.fault[view.slot] = view.generation
                return Outcome.FAULT, 0
            held.append(domain)
        start = time.monotonic_ns()
        if self.hasher.midstates:
            pages = self._advance(view, held)
        else:
            pages = self._run_to_end(view, held)
            if pages < 0:
                return Outcome.GONE, 0
        if self._on_span is not None:
            finished = self._is_finished(view, pair)
            self._on_span(view.slot, view.generation, pages, start, time.monotonic_ns(), finished)
        return Outcome.WORKED, pages

    def _take_over(self, view: View, domain: int) -> _Domain | None:
        """Continue a domain from its newest result; None when that covers less than what was released.

        Whoever held the domain before may have died after publishing and before releasing: what the
        result covers is released first, and never hashed again.
        """
        newest = view.smc.newest(domain, view.generation)
        blocks = newest.blocks if newest is not None else 0
        released = view.smc.blocks_released(domain)
        if blocks < released:
            return None
        if blocks > released:
            view.smc.raise_released(domain, blocks, self.worker, self.incarnation)
        self._release_behind(view, domain, blocks)
        if newest is not None and newest.final:
            return _Domain(domain, newest, None, blocks)
        # Taken out while it is worked on: a chain that an error left half-way must not be found again.
        cached = view.chains.pop(domain, None)
        if cached is not None and cached[0] == blocks:
            return _Domain(domain, newest, cached[1], blocks)
        if newest is not None:
            chain = self.hasher.resume(newest.state, newest.length)
        else:
            chain = self.hasher.start()
            chain.update(prefix(view.launch, domain))
        return _Domain(domain, newest, chain, blocks)

    def _release_behind(self, view: View, domain: int, blocks: int) -> None:
        """Release what a dead holder left, backwards to the first block that is released."""
        first = blocks
        while first > 0 and not self._is_block_released(view, domain, first - 1):
            first -= 1
        self._release(view, domain, first, blocks)

    def _advance(self, view: View, held: list[_Domain]) -> int:
        """Hash the blocks that are VALID, at most a stripe a domain; pages measured."""
        work: list[tuple[_Domain, int]] = []
        for domain in held:
            if domain.chain is None:
                continue
            count = self._ready_blocks(view, domain.number, domain.blocks)
            if count:
                work.append((domain, count))
        if work:
            self.hasher.extend(
                [domain.chain for domain, _ in work if domain.chain is not None],
                [self._span(view, domain.number, domain.blocks, count) for domain, count in work],
            )
        self._point("hashed")
        self._commit(view, [(domain, domain.blocks + count) for domain, count in work])
        return self._page_total(view, [(domain.number, domain.blocks, count) for domain, count in work])

    def _commit(self, view: View, results: list[tuple[_Domain, int]]) -> None:
        """Result -> blocks released -> pages released; see :mod:`enturbo.shm.smc` for why this order."""
        for domain, blocks in results:
            chain = domain.chain
            assert chain is not None
            final = blocks == int(view.totals[domain.number])
            state = chain.digest() if final else chain.midstate()
            view.smc.publish(
                domain.number, view.generation, domain.newest, state, chain.length, blocks=blocks, final=final
            )
            view.chains[domain.number] = (blocks, chain)
        self._point("published")
        for domain, blocks in results:
            view.smc.raise_released(domain.number, blocks, self.worker, self.incarnation)
        self._point("raised")
        for domain, blocks in results:
            self._release(view, domain.number, domain.blocks, blocks)

    def _run_to_end(self, view: View, held: list[_Domain]) -> int:
        """For hashers without midstates: each domain to its digest, waiting for VALID inside the claim.

        -1 when the launch closed meanwhile. None of a domain's pages is released before its digest, so
        whoever takes over starts it again from its first page.
        """
        pages = 0
        for domain in held:
            if domain.chain is None:
                continue
            done, total, pause = 0, int(view.totals[domain.number]), 50e-6
            while done < total:
                count = self._ready_blocks(view, domain.number, done)
                if count:
                    span = self._span(view, domain.number, done, count)
                    self.hasher.extend([domain.chain], [span])
                    done, pause = done + count, 50e-6
                    view.smc.hashed[domain.number] = done
                elif self._is_open(view):
                    time.sleep(pause)
                    pause = min(2 * pause, 2e-3)
                else:
                    return -1
            self._point("hashed")
            self._commit(view, [(domain, total)])
            pages += self._page_total(view, [(domain.number, 0, total)])
        return pages

    def _ready_blocks(self, view: View, domain: int, start: int) -> int:
        """How many blocks from ``start`` on are VALID, at most a stripe."""
        most = min(view.stripe, int(view.totals[domain]) - start)
        if most > 0 and self._is_block_valid(view, domain, start + most - 1) and view.launch.copy_mode == 0:
            return most  # copied in ascending order: the last one tells
        count = 0
        while count < most and self._is_block_valid(view, domain, start + count):
            count += 1
        return count

    def _span(self, view: View, domain: int, start: int, count: int) -> Span:
        launch = view.launch
        return Span(
            view.pages,
            view.block_start(domain, start),
            launch.block,
            launch.block * launch.domains,
            count,
            launch.page_count,
        )

    def _page_total(self, view: View, work: list[tuple[int, int, int]]) -> int:
        total = 0
        for domain, start, count in work:
            if count:
                last = start + count - 1
                total += (count - 1) * view.launch.block
                total += view.block_end(domain, last) - view.block_start(domain, last)
        return total

    def _release(self, view: View, domain: int, start: int, end: int) -> None:
        for block in range(start, end):
            first, past = view.block_start(domain, block), view.block_end(domain, block)
            self.memory.epcm.release(view.launch.first_page + first, past - first, view.generation)

    def _point(self, name: str) -> None:
        if self._fault is not None:
            self._fault(name)
