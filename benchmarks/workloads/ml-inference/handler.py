"""Reads handwritten digits of 8 x 8 pixels with a support vector machine.

Events: ``{"pixels": [64 numbers from 0 to 16, row by row]}`` and ``{"evaluate": true}``. The first call
trains the model, on three of every four rows of scikit-learn's digits; the others tell how good it is.
Answers are whole numbers, and no row lies so near to a border that a processor's rounding would decide it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

# joblib, which scikit-learn imports, makes a semaphore to see whether it may start processes. In an enclave
# that is output: the import would wait for the verdict, and then be refused.
os.environ["JOBLIB_MULTIPROCESSING"] = "0"

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

PIXELS = 64
BRIGHTEST = 16


class Trained(NamedTuple):
    """A model, and the rows that it has not seen."""

    model: Any
    rows: Any
    digits: Any


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer one event; see the module."""
    match event:
        case {"pixels": [*pixels]}:
            if len(pixels) != PIXELS:
                return {"error": f"expected {PIXELS} pixels, found {len(pixels)}"}
            if not all(isinstance(pixel, int) and 0 <= pixel <= BRIGHTEST for pixel in pixels):
                return {"error": f"pixels are whole numbers from 0 to {BRIGHTEST}"}
            return {"digit": int(trained().model.predict(np.array([pixels], dtype=float))[0])}
        case {"evaluate": True}:
            return evaluate()
    return {"error": "expected pixels, or evaluate"}


def evaluate() -> dict[str, Any]:
    """How many rows that it has not seen the model reads right, and which digits it takes for which."""
    model, rows, digits = trained()
    found = model.predict(rows)
    wrong = np.flatnonzero(found != digits)
    return {
        "tested": len(rows),
        "correct": len(rows) - len(wrong),
        "mistakes": [{"is": int(digits[at]), "read_as": int(found[at])} for at in wrong],
    }


@cache
def trained() -> Trained:
    """The model, trained once in an enclave's life."""
    rows, digits = load_digits(return_X_y=True)
    held_out = np.arange(len(rows)) % 4 == 3
    model = SVC(gamma=0.001, tol=1e-4).fit(rows[~held_out], digits[~held_out])
    return Trained(model, rows[held_out], digits[held_out])
