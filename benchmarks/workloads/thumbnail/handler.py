"""Makes thumbnails of a photograph.

Events: ``{"photo": name, "sizes": [longest edge in pixels, …]}`` for one of the image's files, or with
``"image"``, base64, instead of a photo. The answer names the main colour of each sixth of a thumbnail instead
of carrying its bytes, which differ between versions of the JPEG library.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from typing import Any

from PIL import Image, UnidentifiedImageError

COLUMNS, ROWS = 3, 2
SMALLEST, LARGEST = 16, 1024  # pixels
QUALITY = 85
COLOURS = {
    "white": (240, 240, 240),
    "silver": (192, 192, 192),
    "grey": (144, 144, 144),
    "orange": (240, 150, 60),
    "brown": (140, 100, 65),
    "olive": (80, 85, 55),
    "teal": (15, 70, 65),
    "blue": (60, 100, 200),
}


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event; see the module."""
    match event:
        case {"photo": str(name), "sizes": [*sizes]}:
            try:
                source = context.open(name)
            except FileNotFoundError:
                return {"error": f"no photograph {name!r}"}
        case {"image": str(text), "sizes": [*sizes]}:
            try:
                source = io.BytesIO(base64.b64decode(text, validate=True))
            except binascii.Error:
                return {"error": "the image is not base64"}
        case _:
            return {"error": "expected a photo or an image, and sizes"}
    if not all(isinstance(size, int) and SMALLEST <= size <= LARGEST for size in sizes):
        return {"error": f"sizes go from {SMALLEST} to {LARGEST} pixels"}
    try:
        with Image.open(source) as photo:
            made = [describe(thumbnail(photo, size)) for size in sizes]
            return {
                "format": photo.format,
                "width": photo.width,
                "height": photo.height,
                "thumbnails": made,
            }
    except UnidentifiedImageError:
        return {"error": "not an image"}


def thumbnail(photo: Image.Image, size: int) -> bytes:
    """A JPEG whose longest edge has ``size`` pixels."""
    small = photo.convert("RGB")
    small.thumbnail((size, size))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def describe(encoded: bytes) -> dict[str, Any]:
    """What a thumbnail is, seen by someone who decodes it."""
    with Image.open(io.BytesIO(encoded)) as picture:
        cells = picture.resize((COLUMNS, ROWS), Image.Resampling.BOX)
        return {
            "format": picture.format,
            "width": picture.width,
            "height": picture.height,
            "colours": [[_nearest(cells, x, y) for x in range(COLUMNS)] for y in range(ROWS)],
        }


def _nearest(cells: Image.Image, x: int, y: int) -> str:
    cell: Any = cells.getpixel((x, y))
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], cell))
