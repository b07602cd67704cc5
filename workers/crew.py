"""The threads that measure images: who hashes what, and when.

Threads take work that needs nothing of each other and walk an image's parts (:mod:`enturbo.workers.parts`)
on their own, so they never wait; hashers give the GIL back. A thread needs a few MiB, whatever the size::

    several chains an image    cut into shares, one a thread; a share fills the lanes by itself   shares.py
    one chain an image         cannot be cut and fills one lane; two fill two                     chains.py

What cannot be cut is begun first, and the largest first. While there are no more chains than threads each has
a thread of its own, because two lanes on two cores do more than two lanes on one. With more of them, a thread
advances as many as its hasher has lanes, and when one ends the next one that waits takes its lane.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

from .chains import ImageChain, advance, record_size
from .parts import StreamRegion
from .sha256 import Hasher, get_hasher
from .shares import Share, cut

ALONE: Final = 512  # pages; below this, threads cost more than they save
SCATTERED: Final = 8  # pages a region; below this, regions are more work than pages

_T = TypeVar("_T")


class Stream(NamedTuple):
    """An image as its chains: they open with ``openings`` and share the pages by blocks of ``block``."""

    regions: Sequence[StreamRegion]
    openings: Sequence[bytes]
    block: int

    @property
    def page_count(self) -> int:
        """Pages of all chains."""
        return sum(region.page_count for region in self.regions)

    @property
    def size(self) -> int:
        """Bytes of records."""
        return sum(region.page_count * record_size(region.chunks) for region in self.regions)

    def shares(self, threads: int, lanes: int) -> list[list[int]]:
        """The chains of each share, by number.

        One share for a small image, and for one of many small regions: to walk those takes the GIL, and each
        share walks all of them.
        """
        if self.page_count < max(ALONE, SCATTERED * len(self.regions)):
            threads = 1
        return cut(len(self.openings), threads, lanes)


def digests_of(
    streams: Sequence[Stream],
    *,
    workers: int = 0,
    hasher: str | Hasher | None = None,
    done: Callable[[int], None] | None = None,
) -> list[list[bytes]]:
    """The digests of each stream's chains; parameters and errors as of ``measure_streams``."""
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if hasher is None or isinstance(hasher, str):
        hasher = get_hasher(hasher)
    threads = workers or len(os.sched_getaffinity(0))
    if sum(stream.page_count for stream in streams) < ALONE:
        threads = 1
    work = _Work(streams, threads, hasher, done)
    hands = work.deal(threads)
    if len(hands) == 1:
        work.run(hands[0])
    else:
        with ThreadPoolExecutor(len(hands), "enturbo-measure") as executor:
            try:
                for _ in executor.map(work.run, hands):
                    pass
            finally:
                work.stopped = True  # Ctrl-C comes to this thread alone
    return [[found[number] for number in range(len(found))] for found in work.found]


class _Work:
    """What the threads of one call take their work from, and where they leave what they found.

    Streams go by their numbers; a chain is made when its turn comes, so those that wait cost nothing.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        threads: int,
        hasher: Hasher,
        done: Callable[[int], None] | None,
    ) -> None:
        self.streams, self.hasher, self.done = streams, hasher, done
        self.stopped = False
        self.found: list[dict[int, bytes]] = [{} for _ in streams]
        self._lock = threading.Lock()
        largest_first = sorted(range(len(streams)), key=lambda number: -streams[number].size)
        self._chains = deque(number for number in largest_first if len(streams[number].openings) == 1)
        shared = {
            number: streams[number].shares(threads, hasher.lanes)
            for number in largest_first
            if len(streams[number].openings) > 1
        }
        self._shares = deque(
            (number, share)
            for number in sorted(shared, key=lambda number: len(shared[number]))
            for share in shared[number]
        )

    def deal(self, threads: int) -> list[list[int]]:
        """The chains that each of at most ``threads`` threads begins with.

        One each, then the second lanes from the last thread to the first: who has the largest chain gets a
        second one last.
        """
        count = max(1, min(threads, len(self._chains) + len(self._shares)))
        hands: list[list[int]] = [[] for _ in range(count)]
        for lane in range(self.hasher.lanes):
            for hand in hands if lane % 2 == 0 else reversed(hands):
                if self._chains:
                    hand.append(self._chains.popleft())
        return hands

    def run(self, hand: Sequence[int]) -> None:
        """What one thread does: chains as long as there are any, then shares."""
        try:
            self._run_chains(hand)
            while not self.stopped and (waiting := _pop(self._shares)):
                number, share = waiting
                stream = self.streams[number]
                job = Share(self.hasher, stream.regions, share, stream.openings, stream.block)
                self._put(number, job.run())
        except BaseException:
            self.stopped = True
            raise

    def _run_chains(self, hand: Sequence[int]) -> None:
        lanes = [(number, self._begin(number)) for number in hand]
        while lanes and not self.stopped:
            offers = [chain.offer() for _, chain in lanes]
            if all(offers):
                advance(self.hasher, [chain for _, chain in lanes], min(offers))
                continue
            number, chain = lanes.pop(offers.index(0))
            self._put(number, {0: chain.digest()})
            if (waiting := _pop(self._chains)) is not None:
                lanes.append((waiting, self._begin(waiting)))

    def _begin(self, number: int) -> ImageChain:
        stream = self.streams[number]
        return ImageChain(self.hasher, stream.openings[0], stream.regions)

    def _put(self, number: int, digests: dict[int, bytes]) -> None:
        with self._lock:
            self.found[number] |= digests
            if self.done is not None and len(self.found[number]) == len(self.streams[number].openings):
                self.done(number)


def _pop(queue: deque[_T]) -> _T | None:
    """The first that waits. Other threads may empty the queue at any time, so asking before is of no use."""
    try:
        return queue.popleft()
    except IndexError:
        return None
