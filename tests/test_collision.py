"""The security argument, run: with a hash of a few bits, two images with one value give a collision."""

from __future__ import annotations

import hashlib
import itertools
import random

import pytest

from enturbo.workers.collision import MeasuredImage, extract_collision
from enturbo.workers.decoder import Page
from enturbo.workers.records import Ecreate


def weak(message: bytes) -> bytes:
    """The first 12 bits of SHA-256."""
    digest = hashlib.sha256(message).digest()
    return bytes((digest[0], digest[1] & 0xF0))


def random_image(source: random.Random) -> MeasuredImage:
    """A few pages, a few chunks."""
    pages = [
        Page(
            number * 4096,
            source.choice((0x201, 0x203, 0x205)),
            tuple((chunk, source.randbytes(256)) for chunk in sorted(source.sample(range(16), 2))),
        )
        for number in range(source.randint(0, 5))
    ]
    return MeasuredImage(Ecreate(1, 1 << 20), pages, source.choice((1, 2, 4)), source.choice((1, 2)))


@pytest.mark.parametrize("seed", range(8))
def test_random_images(seed: int) -> None:
    source = random.Random(seed)
    seen: dict[bytes, MeasuredImage] = {}
    for _ in range(5000):
        image = random_image(source)
        other = seen.setdefault(image.value(weak), image)
        if other != image:
            break
    else:
        pytest.fail("12 bits and 5000 images, but no two with one value")
    left, right = extract_collision(image, other, weak)
    assert left != right
    assert weak(left) == weak(right)


def test_in_one_domain() -> None:
    """Same root, one changed page: the collision is in that page's domain."""
    source = random.Random(5)
    image = MeasuredImage(Ecreate(1, 1 << 20), [Page(n * 4096, 0x201) for n in range(8)], 4, 1)
    genuine = [*image.pages]
    for _ in itertools.repeat(None, 200_000):
        genuine[2] = Page(2 * 4096, 0x201, ((3, source.randbytes(256)),))
        forged = image._replace(pages=[*genuine])
        if forged.value(weak) == image.value(weak):
            left, right = extract_collision(image, forged, weak)
            assert left != right
            assert weak(left) == weak(right)
            if left.startswith(b"HASHDOM\0\2\0\0\0"):
                return
    pytest.fail("no collision in domain 2 found")


def test_nothing_to_extract() -> None:
    image = random_image(random.Random(1))
    with pytest.raises(ValueError, match="the same"):
        extract_collision(image, image)
    with pytest.raises(ValueError, match="the values differ"):
        extract_collision(image, image._replace(ecreate=Ecreate(2, 1 << 20)))
