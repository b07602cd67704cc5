"""Finds faces in a photograph, with the Haar cascade that OpenCV's wheel brings along.

Events: ``{"photo": name}`` for one of the image's files, or ``{"image": base64}``. Faces are told to the
nearest 50 pixels: a detector's last digits depend on how a library rounds.
"""

from __future__ import annotations

import base64
import binascii
from functools import cache
from typing import Any

import cv2
import numpy as np

CASCADE = "site-packages/cv2/data/haarcascade_frontalface_default.xml"
GRID = 50  # pixels
SMALLEST = (60, 60)  # pixels: smaller faces are not looked for


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event; see the module."""
    match event:
        case {"photo": str(name)}:
            try:
                content = context.view(name)
            except FileNotFoundError:
                return {"error": f"no photograph {name!r}"}
        case {"image": str(text)}:
            try:
                content = base64.b64decode(text, validate=True)
            except binascii.Error:
                return {"error": "the image is not base64"}
        case _:
            return {"error": "expected a photo or an image"}
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE) if content else None
    if picture is None:
        return {"error": "not an image"}
    height, width = picture.shape
    return {"width": width, "height": height, "faces": find_faces(picture, context)}


def find_faces(picture: Any, context: Any) -> list[dict[str, int]]:
    """Centre and size of each face, from left to right."""
    found = _cascade(context).detectMultiScale(
        cv2.equalizeHist(picture), scaleFactor=1.1, minNeighbors=5, minSize=SMALLEST
    )
    return [
        {"x": _rough(x + width / 2), "y": _rough(y + height / 2), "size": _rough(max(width, height))}
        for x, y, width, height in sorted(np.asarray(found, dtype=int).reshape(-1, 4).tolist())
    ]


@cache
def _cascade(context: Any) -> Any:
    # OpenCV opens the file itself.
    cascade = cv2.CascadeClassifier(context.path(CASCADE))
    if cascade.empty():
        raise RuntimeError(f"{CASCADE}: OpenCV cannot read it")
    return cascade


def _rough(value: float) -> int:
    return round(value / GRID) * GRID
