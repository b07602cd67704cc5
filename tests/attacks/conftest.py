"""What attacks are launched with: runtimes of both levels, images of the catalogue, a verdict that waits.

runtimes(level) ─► launch(image, event) ─► wait_stopped() ─► judge() ─► REJECTED
                        │                        │
      the catalogue's ──┘                        └─ it is through, or refused, or held, or dead
      program inside writes what it does
      into its heap, where we read it
"""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from enturbo import Enclave, EnclaveImage, EnclaveState, Measurement, MeasurementMismatch, Runtime
from enturbo.runtime.startup import Start
from enturbo.runtime.syscalls import NUMBERS

WAIT: Final = 30.0  # seconds; a bound on every wait here, never a measure
NOBODY: Final = bytes(32)  # what a launch is expected to measure to that is to be REJECTED
CATALOGUE: Final = Path(__file__).parent / "catalogue"
_NAMES: Final = {number: name for name, number in NUMBERS.items()}


def until(condition: Callable[[], Any]) -> Any:
    """Look again and again, for a bounded time; the first value that is true."""
    deadline = time.monotonic() + WAIT
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    return value


class Verdict:
    """While one exists, launches that it was told of are not judged before :meth:`let`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._held: set[int] = set()
        self._event, verify = threading.Event(), Start.verify

        def late(start: Start, mrenclave: bytes) -> bool:
            if id(start.expected) in self._held:
                assert self._event.wait(2 * WAIT)
            return verify(start, mrenclave)

        patch.setattr(Start, "verify", late)

    def hold(self, expected: Measurement) -> None:
        """Hold back the verdict on the launch that expects this very object."""
        self._held.add(id(expected))

    def let(self) -> None:
        """Judge them, now and from now on."""
        self._event.set()


class Launch:
    """One enclave that runs a program of the catalogue, and what can be seen of it by its host."""

    def __init__(
        self, runtime: Runtime, image: EnclaveImage, event: Any, verdict: Verdict, options: dict[str, Any]
    ) -> None:
        self._runtime, self._verdict = runtime, verdict
        index = 0
        for region in image.regions:
            if not region.chunks:
                break
            index += region.page_count
        else:
            raise AssertionError("the image has no heap")
        self._heap, self._heap_pages = index, region.page_count
        genuine, late = options.pop("verified", False), options.pop("late", True)
        self.expected = replace(image.measure()) if genuine else replace(image.measure(), digest=NOBODY)
        if late:
            verdict.hold(self.expected)
        self.enclave: Enclave = runtime.launch(image, expected=self.expected, **options)
        self.future = self.enclave.submit(event)
        self._stopped = ""

    @property
    def pid(self) -> int:
        """The process; 0 as long as there is none."""
        session = self.enclave._session
        assert session is not None
        process = session.process
        return 0 if process is None else process.pid

    @property
    def heap_page(self) -> int:
        """The first page of its heap in the EPC."""
        return self.enclave._start.place.first_page + self._heap

    def notes(self) -> list[str]:
        """What the program has written down so far, a line a step."""
        epc = self._runtime.memory.epc
        text = bytes(epc.pages(self.heap_page, self._heap_pages)).split(b"\0", 1)[0]
        return text.decode("ascii", "replace").split("\n")[:-1]

    def wait_begun(self) -> None:
        """Until the attack's code runs."""
        until(self.notes)

    def look_stopped(self) -> str:
        """Why the program's first thread does not go on: see :meth:`wait_stopped`; "" as long as it does.

        A call that is held is taken from the listener once, and stays held.
        """
        if not self._stopped:
            self._stopped = self._look()
        return self._stopped

    def _look(self) -> str:
        notes = self.notes()
        if notes and notes[-1].startswith(("done", "refused")):
            return notes[-1]
        session, guard = self.enclave._session, self.enclave._guard
        assert session is not None
        assert guard is not None
        process, broker = session.process, guard._broker
        if process is None or process.pidfd < 0:
            return ""
        if select.select([process.pidfd], [], [], 0)[0]:
            return "died"
        if broker is not None and select.select([broker._listener.fd], [], [], 0)[0]:
            call = broker._listener.receive()
            if call is not None:
                return f"held: {_NAMES.get(call.number, call.number)}"
        return ""

    def wait_stopped(self) -> str:
        """Until the program's first thread is through or goes on no more.

        "done" (or "done: …"), "refused: EACCES" (an error that it did not expect), "held: openat" (sleeps in
        that call), "died".
        """
        stopped: str = until(self.look_stopped)
        return stopped

    def close(self) -> None:
        """End it. What was logged keeps its error, which is not to keep all that was on the stack."""
        self.enclave.close()
        error = self.future.exception(WAIT)
        if error is not None:
            error.__traceback__ = None

    def check_nothing_told(self) -> None:
        """The host's API, before the verdict: whatever became of the process, it is not announced."""
        session = self.enclave._session
        assert session is not None
        assert not self.future.done()
        assert self.enclave.state in ("CREATED", "COPYING", "MEASURING", "MEASURED")
        assert self.enclave.stdout == self.enclave.stderr == b""
        assert session.process is None or session.process.returncode is None

    def judge(self) -> None:
        """Let the verdict come, which is REJECTED, and look at what the host's API tells then: nothing."""
        self._verdict.let()
        with pytest.raises(MeasurementMismatch):
            self.enclave.wait_verified(WAIT)
        assert self.enclave.state is EnclaveState.REJECTED
        with pytest.raises(MeasurementMismatch):
            self.future.result(WAIT)
        assert self.enclave.stdout == self.enclave.stderr == b""
        assert self.enclave.timeline.result is None
        assert self.enclave.timeline.first_instruction is None


class Runtimes:
    """A runtime of each level, "cooperative" and "kernel", made when it is first asked for; small, with one
    worker. What their zygotes inherit as standard error is a file."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._made: dict[str, Runtime] = {}

    def __call__(self, level: str) -> Runtime:
        if level not in self._made:
            kept = os.dup(2)
            try:
                with open(self.stderr(level), "wb") as file:
                    os.dup2(file.fileno(), 2)
                runtime = Runtime(epc="8MiB", workers=1, enforcement=level)
            finally:
                os.dup2(kept, 2)
                os.close(kept)
            self._made[level] = self._stack.enter_context(runtime)
            assert runtime.wait_workers()
        return self._made[level]

    def stderr(self, level: str) -> Path:
        """The file that the zygote of this level has as standard error."""
        return self._folder / level


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtimes]:
    """See :class:`Runtimes`; one of each level a module."""
    with ExitStack() as stack:
        yield Runtimes(tmp_path_factory.mktemp("stderr"), stack)


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., EnclaveImage]]:
    """The image of programs of the catalogue: ``catalogue("kit", "files")``. Each is made once.

    They are modules of the package ``catalogue`` in it; the handler is ``catalogue.kit:handler``, or
    ``handler=``.
    """
    made: dict[tuple[str, ...], EnclaveImage] = {}

    def make(*names: str, handler: str = "catalogue.kit:handler") -> EnclaveImage:
        key = (handler, *names)
        if key not in made:
            folder = tmp_path_factory.mktemp("catalogue")
            (folder / "catalogue").mkdir()
            for name in names:
                shutil.copy(CATALOGUE / f"{name}.py", folder / "catalogue")
            made[key] = EnclaveImage.from_function(folder, handler=handler, heap="64KiB")
        return made[key]

    yield make
    made.clear()  # an image has a descriptor as long as somebody has it


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Verdict]:
    """Holds back the verdict on launches that will be REJECTED; at the end of the test it comes."""
    verdict = Verdict(monkeypatch)
    yield verdict
    verdict.let()


@pytest.fixture
def launch(verdict: Verdict) -> Iterator[Callable[..., Launch]]:
    """``launch(runtime, image, event)``: a :class:`Launch`, to be REJECTED when the verdict is let.

    ``verified=True``: a genuine one; ``late=False``: its verdict does not wait; other options are those of
    ``Runtime.launch``. The event gets ``numbers``, system calls by name. All are closed at the end.
    """
    launches: list[Launch] = []

    def make(runtime: Runtime, image: EnclaveImage, event: dict[str, Any], **options: Any) -> Launch:
        launches.append(Launch(runtime, image, {"numbers": NUMBERS, **event}, verdict, options))
        return launches[-1]

    yield make
    verdict.let()
    for each in launches:
        each.close()
    launches.clear()
