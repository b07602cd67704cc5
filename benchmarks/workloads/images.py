"""From a workload to an image, and how large it is.

An image is built once and kept signed for each combination of startup and scheme; distributions come from
the user's store, so the second build of any workload reads little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from catalogue import Workload

from enturbo import EnclaveImage
from enturbo.runtime.labels import distribution_facts
from enturbo.runtime.region import EXECUTE
from enturbo.shm.layout import PAGE_SIZE


class Sizes(NamedTuple):
    """What an image consists of. Bytes, but for pages."""

    code: int  # native code, R-X
    modules: int  # everything else that distributions brought along, R
    data: int  # the function's own folder and files, and its measured writable region
    heap: int
    measured_pages: int
    distributions: int


def build(workload: Workload, *, bytecode: bool = True) -> EnclaveImage:
    """The workload's image. Raises CatalogueError, ImageFormatError (what it requires is not installed)."""
    return EnclaveImage.from_function(
        workload.folder,
        heap=workload.heap,
        files=workload.resolve_files(),
        exclude=workload.exclude,
        requirements=workload.requirements,
        bytecode=bytecode,
    )


def sizes(image: EnclaveImage) -> Sizes:
    """Where its pages go."""
    distributions: list[dict[str, Any]] = distribution_facts(image.regions)
    theirs = sum(each["pages"] for each in distributions)
    code = sum(region.page_count for region in image.regions if region.flags & EXECUTE)
    heap = sum(region.page_count for region in image.regions if region.is_heap)
    native_of_theirs = sum(each["code_pages"] for each in distributions)
    own = image.page_count - theirs - heap - (code - native_of_theirs)
    return Sizes(
        code * PAGE_SIZE,
        (theirs - native_of_theirs) * PAGE_SIZE,
        own * PAGE_SIZE,
        heap * PAGE_SIZE,
        image.measured_pages,
        len(distributions),
    )
