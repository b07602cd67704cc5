"""Two images with one value are a SHA-256 collision: the security argument of scheme ``enturbo`` as code.

The root's preimage fixes ECREATE, page count, D and B and the domain digests; each stream opens with its own
HASHDOM record; and :mod:`enturbo.workers.decoder` reads the page sequence back from them. So two different
images with one MRENCLAVE differ, with equal hashes, either at the root or in one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .decoder import Page, encode_enturbo
from .records import Ecreate, Hash, sha256


class MeasuredImage(NamedTuple):
    """All that an MRENCLAVE of scheme ``enturbo`` depends on."""

    ecreate: Ecreate
    pages: Sequence[Page]
    domains: int
    block: int

    def value(self, hash: Hash = sha256) -> bytes:
        """MRENCLAVE, with ``hash`` in SHA-256's place."""
        return hash(encode_enturbo(*self, hash)[0])


def extract_collision(a: MeasuredImage, b: MeasuredImage, hash: Hash = sha256) -> tuple[bytes, bytes]:
    """Two different byte strings with one ``hash``, from two different images with one value.

    Raises ValueError if the images are the same, or their values differ.
    """
    root_a, streams_a = encode_enturbo(*a, hash)
    root_b, streams_b = encode_enturbo(*b, hash)
    if hash(root_a) != hash(root_b):
        raise ValueError(f"the values differ: {hash(root_a).hex()} and {hash(root_b).hex()}")
    if root_a != root_b:
        return root_a, root_b
    # Equal roots: as many domains on both sides, and pairwise equal digests.
    for stream_a, stream_b in zip(streams_a, streams_b, strict=True):
        if stream_a != stream_b:
            return stream_a, stream_b
    raise ValueError("the images are the same")
