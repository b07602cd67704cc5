"""numpy dtypes derived from the struct tables of :mod:`enturbo.shm.layout`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .layout import EPCM_ENTRY, LAUNCH, SMC_PROGRESS, SMC_RESULT, Record

_CODES = {"B": "u1", "H": "<u2", "I": "<u4", "Q": "<u8"}


def dtype_of(record: Record) -> np.dtype[Any]:
    """The structured dtype of ``record``: same names, offsets and item size."""
    return np.dtype(
        {
            "names": [field.name for field in record.fields],
            "formats": [
                f"V{field.code[:-1]}" if field.code.endswith("s") else _CODES[field.code]
                for field in record.fields
            ],
            "offsets": [field.offset for field in record.fields],
            "itemsize": record.size,
        }
    )


EPCM_DTYPE = dtype_of(EPCM_ENTRY)
LAUNCH_DTYPE = dtype_of(LAUNCH)
SMC_PROGRESS_DTYPE = dtype_of(SMC_PROGRESS)
SMC_RESULT_DTYPE = dtype_of(SMC_RESULT)
