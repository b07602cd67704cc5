"""Measuring launches in the EPC: claim a pair of hash domains, hash a stripe, publish, release.

Workers and the host run this same code, each with claims on a description of its own. One
:meth:`Measurer.step` measures one stripe:

    choose the pair with the least progress whose next pages are VALID (or can be copied by its holder)
    claim it -> look at the generation again -> take over: newest result of each domain, release what it
    covers -> hash the next blocks of both domains in two lanes -> publish results -> raise blocks released
    -> release the pages -> give the claim back

Who copies is the launch's copy mode: the host; or holders of claims, everything first (a step then copies
rows until none are left) or each stripe directly before it is hashed. A page that somebody waits for is
copied ahead of its turn (:meth:`Measurer.fill_touched`). :mod:`enturbo.workers.filling` has all of that.

A pair of one domain fills one lane; where more such chains wait than there are measurers, the chain of a
second launch takes the other.

Nothing here waits while holding a claim, with one exception: a hasher that cannot export midstates keeps a
pair until its digests are final, and leaves when the launch closes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from ..shm.launches import Claims, Launch
from ..shm.layout import COPY_BY_HOST, COPY_FIRST, FAULT_SMC, HOST_WORKER, SCRUB
from ..shm.memory import Memory
from ..shm.smc import Result
from .filling import Filler, Sources, is_open
from .protocol import SPAN
from .sha256 import Chain, Hasher
from .view import STRIPE_PAGES, OnSpan, Outcome, View, prefix
from .wrlock import WriteLocks

Partners = Sequence[tuple[int, int]]  # (generation, slot) of launches
_NOBODY: Final[Partners] = ()
_UNGATED: Final[Mapping[int, WriteLocks]] = MappingProxyType({})


class _Domain(NamedTuple):
    """One domain that this measurer holds: its newest result and the chain that continues it."""

    view: View
    number: int
    newest: Result | None
    chain: Chain | None  # None: the result is final
    blocks: int  # included in the chain


def settled(launch: Launch) -> dict[int, bytes]:
    """The digests of the domains without pages: that of their first record alone.

    The host stores them when it opens the launch, so nobody claims a domain to hash nothing.
    """
    empty = max(0, launch.domains + launch.page_count // -launch.block)
    if not empty:
        return {}
    # Of the launch only what the records hold, so that all small launches of a kind share one answer.
    like = launch._replace(generation=0, first_page=0, page_count=0, copy_mode=0)
    return _empty_digests(like, launch.domains - empty)


@functools.lru_cache(maxsize=64)
def _empty_digests(launch: Launch, first: int) -> dict[int, bytes]:
    return {
        domain: hashlib.sha256(prefix(launch, domain)).digest() for domain in range(first, launch.domains)
    }


class Measurer:
    """One role that measures: a worker, or a thread of the host.

    ``host``: the process whose descriptors launches name as their files; None: this one. ``locks``: of gated
    launches, by generation; they come and go while this measures.
    """

    def __init__(
        self,
        memory: Memory,
        claims: Claims,
        hasher: Hasher,
        *,
        worker: int = HOST_WORKER,
        incarnation: int = 0,
        host: int | None = None,
        on_span: OnSpan | None = None,
        fault: Callable[[str], None] | None = None,
        locks: Mapping[int, WriteLocks] = _UNGATED,
    ) -> None:
        self.memory, self.claims, self.hasher = memory, claims, hasher
        self._locks = locks
        self.worker, self.incarnation = worker, incarnation
        self._on_span = on_span
        self._fault = fault
        self._views: dict[int, View] = {}
        self.sources = Sources(host)
        self._filler = Filler(memory, claims, self.sources, self._point, on_span)

    def step(self, slot: int, generation: int, partners: Partners = _NOBODY) -> Outcome:
        """One stripe of the launch: a part of one pair, or several pairs where each has little left.

        ``partners``: launches of which one may lend its only chain to the second lane.
        """
        view = self._view(slot, generation)
        if view is None:
            return Outcome.GONE
        if int(self.memory.launches.fault[slot]) == generation:
            return Outcome.FAULT
        mode = view.launch.copy_mode
        if mode == SCRUB or (mode == COPY_FIRST and not view.filled):
            outcome = self._filler.step(view)
            if mode == SCRUB or outcome in (Outcome.WORKED, Outcome.GONE, Outcome.FAULT):
                return outcome
            # Others hold what is left to copy: measure meanwhile.
        order = [pair for pair, maybe in view.order() if not (maybe and self._is_finished(view, pair))]
        if not order:
            self._views.pop(slot, None)
            return Outcome.FINISHED
        return self._measure(view, order, partners)

    def look(self, slot: int, generation: int) -> Outcome:
        """What :meth:`step` would say, without doing anything: FINISHED, GONE, FAULT, or else BUSY."""
        view = self._view(slot, generation)
        if view is None:
            return Outcome.GONE
        if int(self.memory.launches.fault[slot]) == generation:
            return Outcome.FAULT
        for pair, maybe in view.order():
            if not (maybe and self._is_finished(view, pair)):
                return Outcome.BUSY
        return Outcome.FINISHED

    def fill_touched(self, slot: int, generation: int, page: int) -> Outcome:
        """Have the image's page ``page`` copied now: somebody waits for it. For any thread with a measurer of
        its own. See :meth:`enturbo.workers.filling.Filler.fill_touched`."""
        view = self._view(slot, generation)
        return Outcome.GONE if view is None else self._filler.fill_touched(view, page)

    def forget(self) -> None:
        """Drop cached launches, and with them all views of the shared memory, and their files."""
        self._views.clear()
        self.sources.forget()

    # ------------------------------------------------------------------ looking for work, no claim held

    def _measure(self, view: View, order: Sequence[int], partners: Partners) -> Outcome:
        outcome, pages = Outcome.BUSY, 0
        for pair in order:
            if pages >= STRIPE_PAGES:
                break
            if not self._is_ready(view, pair):
                if outcome is Outcome.BUSY:
                    outcome = Outcome.WAITING
                if view.launch.copy_mode == COPY_BY_HOST:
                    # Copied in ascending order but for what somebody waits for: the other pairs wait for
                    # later pages. If theirs came early they are hashed when this pair's are there.
                    break
                continue
            if not self.claims.claim(view.slot, pair, view.launch.group):
                continue
            held = [(view, pair)]
            try:
                held += self._partner(view, partners)
                done, measured = self._work(held)
            finally:
                for each, number in held:
                    self.claims.give_back(each.slot, number, each.launch.group)
            if done is not Outcome.WORKED:
                return done
            outcome = done
            pages += measured
        return outcome

    def _partner(self, view: View, partners: Partners) -> list[tuple[View, int]]:
        """Another launch's only chain, claimed: it shares the hasher's lanes with that of ``view``."""
        if view.launch.domains > 1 or self.hasher.lanes < 2:
            return []
        for generation, slot in partners:
            other = self._view(slot, generation)
            if (
                other is not None
                and other.launch.domains == 1
                and int(self.memory.launches.fault[slot]) != generation
                and not other.finished[0]
                and self._is_ready(other, 0)
                and self.claims.claim(slot, 0)
            ):
                if is_open(self.memory, other):
                    return [(other, 0)]
                self.claims.give_back(slot, 0)
        return []

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
        if not is_open(self.memory, view):
            self._views.pop(slot, None)
            return None
        return view

    def _is_finished(self, view: View, pair: int) -> bool:
        """Finished is when the last page of each domain is released, not when its result is final.

        Between the two a worker may die; then another claims the pair to release the rest.
        """
        if not view.is_through(pair):
            return False
        if not self.memory.epcm.all_released(view.last_pages[pair], view.generation):
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
            block, total = view.smc.blocks_released(domain), view.totals[domain]
            if block < total:
                if (view.fused and view.can_fill) or self._is_block_valid(view, domain, block):
                    return True
            elif not self._is_block_released(view, domain, total - 1):
                return True
        return False

    def _is_block_valid(self, view: View, domain: int, block: int) -> bool:
        """Whether all pages of a block are VALID. One of them tells nothing of the others: what somebody
        waits for is copied ahead of its turn, and a copier may die in the middle of a row."""
        if self._is_known_valid(view, domain, block):
            return True
        first, end = view.block_start(domain, block), view.block_end(domain, block)
        first_page, count = view.launch.first_page + first, end - first
        return self.memory.epcm.first_not_valid(first_page, count, view.generation) == count

    def _is_known_valid(self, view: View, domain: int, block: int) -> bool:
        """Whether all blocks of the domain up to this one are VALID, without a look at their pages.

        The front of a host that copies, and the rows that holders of a pair's claim have copied, are stored
        after VALID of all pages that they cover, by who alone copies those, and set back only under the
        range. Who dies before leaves them too low, never too high.
        """
        if view.launch.copy_mode != COPY_BY_HOST:
            return int(view.copied[domain // view.width]) > block
        return int(self.memory.launches.copy_front[view.slot]) >= view.block_end(domain, block)

    # ------------------------------------------------------------------------- working, the claim is held

    def _work(self, held: Sequence[tuple[View, int]]) -> tuple[Outcome, int]:
        """A stripe of each pair that is held: what it came to, and the pages measured."""
        # The claim may have been waited out by a close: only a generation read *after* taking it counts.
        # Closing takes the whole range, so from here on it waits for this claim.
        view, pair = held[0]
        if not is_open(self.memory, view):
            return Outcome.GONE, 0
        self._point("claimed")
        domains: list[_Domain] = []
        for each, number in held:
            taken = [self._take_over(each, domain) for domain in each.domains(number)]
            if None in taken:
                self.memory.launches.report_fault(each.slot, each.generation, FAULT_SMC)
                return Outcome.FAULT if each is view else Outcome.WORKED, 0
            domains += [domain for domain in taken if domain is not None]
        if view.fused and view.can_fill:
            least = min(domain.blocks for domain in domains if domain.view is view)
            until = least + view.stripe_from(least, view.pair_rows[pair])
            if self._filler.fill(view, pair, until) is Outcome.FAULT:
                return Outcome.FAULT, 0
        start = time.monotonic_ns()
        pages = self._advance(domains) if self.hasher.midstates else self._run_to_end(view, pair, domains)
        if pages is None:
            return Outcome.GONE, 0
        if self._on_span is not None:
            end = time.monotonic_ns()
            for each, number in held:
                finished = self._is_finished(each, number)
                self._on_span(SPAN, each.slot, each.generation, pages.get(each.slot, 0), start, end, finished)
        return Outcome.WORKED, sum(pages.values())

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
            return _Domain(view, domain, newest, None, blocks)
        # Taken out while it is worked on: a chain that an error left half-way must not be found again.
        cached = view.chains.pop(domain, None)
        if cached is not None and cached[0] == blocks:
            return _Domain(view, domain, newest, cached[1], blocks)
        if newest is not None:
            chain = self.hasher.resume(newest.state, newest.length)
        else:
            chain = self.hasher.start()
            chain.update(prefix(view.launch, domain))
        return _Domain(view, domain, newest, chain, blocks)

    def _release_behind(self, view: View, domain: int, blocks: int) -> None:
        """Release what a dead holder left, backwards to the first block that is released."""
        first = blocks
        while first > 0 and not self._is_block_released(view, domain, first - 1):
            first -= 1
        if first < blocks:
            self._release(view, domain, 1, first, blocks)

    def _advance(self, held: Sequence[_Domain]) -> dict[int, int]:
        """Hash the blocks that are VALID, at most a stripe a domain; pages measured, by slot."""
        work: list[tuple[_Domain, int]] = []
        for domain in held:
            if domain.chain is None:
                continue
            count = self._ready_blocks(domain.view, domain.number, domain.blocks)
            if count:
                work.append((domain, count))
        if work:
            self.hasher.extend(
                [domain.chain for domain, _ in work if domain.chain is not None],
                [domain.view.span(domain.number, domain.blocks, count) for domain, count in work],
            )
        self._point("hashed")
        self._commit([(domain, domain.blocks + count) for domain, count in work])
        pages: dict[int, int] = {}
        for domain, count in work:
            total = domain.view.page_total(domain.number, domain.blocks, count)
            pages[domain.view.slot] = pages.get(domain.view.slot, 0) + total
        return pages

    def _commit(self, results: Sequence[tuple[_Domain, int]]) -> None:
        """Result -> blocks released -> pages released; see :mod:`enturbo.shm.smc` for why this order."""
        for domain, blocks in results:
            chain, view = domain.chain, domain.view
            assert chain is not None
            final = blocks == view.totals[domain.number]
            state = chain.digest() if final else chain.midstate()
            view.smc.publish(
                domain.number, view.generation, domain.newest, state, chain.length, blocks=blocks, final=final
            )
            view.chains[domain.number] = (blocks, chain)
        self._point("published")
        for domain, blocks in results:
            domain.view.smc.raise_released(domain.number, blocks, self.worker, self.incarnation)
        self._point("raised")
        for run in _runs(results):
            domain, blocks = run[0]
            self._release(domain.view, domain.number, len(run), domain.blocks, blocks)

    def _run_to_end(self, view: View, pair: int, held: Sequence[_Domain]) -> dict[int, int] | None:
        """For hashers without midstates: each domain to its digest, waiting for VALID inside the claim.

        None when the launch closed meanwhile. None of a domain's pages is released before its digest, so
        whoever takes over starts it again from its first page.
        """
        pages = 0
        for domain in held:
            if domain.chain is None:
                continue
            done, total, pause = 0, view.totals[domain.number], 50e-6
            while done < total:
                if not view.filled and view.can_fill:
                    # Nobody else can copy what this claim covers.
                    self._filler.fill(view, pair, done + view.stripe)
                count = self._ready_blocks(view, domain.number, done)
                if count:
                    self.hasher.extend([domain.chain], [view.span(domain.number, done, count)])
                    done, pause = done + count, 50e-6
                    view.smc.hashed[domain.number] = done
                elif self._may_go_on(view):
                    time.sleep(pause)
                    pause = min(2 * pause, 2e-3)
                else:
                    return None
            self._point("hashed")
            self._commit([(domain, total)])
            pages += view.page_total(domain.number, 0, total)
        return {view.slot: pages}

    def _may_go_on(self, view: View) -> bool:
        """A wait inside a claim ends with the launch, and with its fault."""
        return is_open(self.memory, view) and int(self.memory.launches.fault[view.slot]) != view.generation

    def _ready_blocks(self, view: View, domain: int, start: int) -> int:
        """How many blocks from ``start`` on are VALID, at most a stripe."""
        total = view.totals[domain]
        most = min(view.stripe_from(start, total), total - start)
        if most <= 0:
            return 0
        if self._is_known_valid(view, domain, start + most - 1):
            return most
        # Where that does not tell, every page is looked at: the stripe at once, some µs of its millisecond.
        return self.memory.epcm.count_valid_rows(view.rows(domain, 1), start, start + most, view.generation)

    def _release(self, view: View, first: int, domains: int, start: int, end: int) -> None:
        """The blocks ``start`` .. ``end`` - 1 of neighbouring domains, ascending: a block's last page tells
        of
        all that stand before it."""
        rows = view.rows(first, domains)
        self.memory.epcm.release_rows(rows, start, end, view.generation)
        locks = self._locks.get(view.generation)
        if locks is not None:
            # Only now may the enclave's stores go through; who dies before this leaves them to the pager.
            self._point("unlocking")
            locks.open_rows(rows, start, end)

    def _point(self, name: str) -> None:
        if self._fault is not None:
            self._fault(name)


def _runs(results: Sequence[tuple[_Domain, int]]) -> Iterator[Sequence[tuple[_Domain, int]]]:
    """Neighbouring domains of one launch whose blocks go from and to the same number: rows of pages."""
    start = 0
    for at in range(1, len(results) + 1):
        if at < len(results):
            (before, upto), (domain, blocks) = results[at - 1], results[at]
            if (
                domain.view is before.view
                and domain.number == before.number + 1
                and (domain.blocks, blocks) == (before.blocks, upto)
            ):
                continue
        yield results[start:at]
        start = at
