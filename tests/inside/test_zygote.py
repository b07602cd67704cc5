"""Zygote and enclave processes: what they hold, how calls end, how they end, and that nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from enturbo.runtime.messages import MAX_FRAME, StreamClosed
from enturbo.runtime.processes import TOKEN, Zygote, ZygoteLost, kill_strays, wait_pidfd
from enturbo.shm.errors import EnturboError

Until = Callable[[Callable[[], bool]], None]
PAGE = 4096

EVAL = """
def handler(event, context):
    scope = {"context": context}
    exec(event, scope)
    return scope.get("result")
"""

# A grandchild that nobody waits for, in a session of its own. Its parent tells its number before it goes:
# the grandchild may be dead directly after.
DETACH = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    pid = os.fork()
    if pid == 0:
        time.sleep(1000)
    os.write(write, str(pid).encode())
    os._exit(0)
os.wait()
result = int(os.read(read, 20))
"""
CHILD = DETACH.replace("os._exit(0)", "time.sleep(1000)").replace("os.wait()", "")


def alive(pid: int) -> bool:
    """Is there a process of this number that is not a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def carriers(token: str) -> list[int]:
    """Every process that carries a zygote's token."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{TOKEN}={token}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def enclave(bench: Any) -> Any:
    return bench.enclave(EVAL)


# ------------------------------------------------------------------------------------ what it holds


def test_the_zygote_holds_the_base_and_nothing_of_the_hosts(bench: Any) -> None:
    modules = {name.partition(".")[0] for name in bench.zygote.modules(20)}
    assert {"enturbo", "msgpack"} <= modules
    assert not {"numpy", "cryptography", "rich", "typer", "psutil", "xxhash", "site", "pytest"} & modules


def test_an_idle_zygote_sleeps(bench: Any) -> None:
    def switches() -> str:
        text = Path(f"/proc/{bench.zygote.pid}/status").read_text()
        return text[text.index("voluntary_ctxt_switches") :]

    def slept() -> bool:
        before = switches()
        time.sleep(0.3)
        return switches() == before

    until_true = time.monotonic() + 30  # it may still be preloading
    while not slept():
        assert time.monotonic() < until_true


def test_descriptors_of_an_enclave(enclave: Any) -> None:
    code = """
import os
result = {}
for fd in os.listdir('/proc/self/fd'):
    try:
        result[int(fd)] = os.readlink(f'/proc/self/fd/{fd}')
    except FileNotFoundError:
        pass
"""
    found = enclave.call(code)
    assert set(found) == {0, 1, 2, 3}
    assert found[0] == "/dev/null"
    assert found[1].startswith("pipe:")
    assert found[2].startswith("pipe:")
    assert found[3].startswith("socket:")


def test_signals_sessions_and_limits(enclave: Any) -> None:
    code = """
import os, resource, signal
result = [os.getsid(0) == os.getpid(), signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
          list(signal.pthread_sigmask(signal.SIG_BLOCK, [])), resource.getrlimit(resource.RLIMIT_CORE)]
"""
    assert enclave.call(code) == [True, True, [], [0, 0]]


def test_pages_without_w_never_reach_the_segment(enclave: Any) -> None:
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
view = context.view('handler.py')
window = (ctypes.c_char * 1).from_address
for line in open('/proc/self/maps'):
    where, rights, offset, *_ = line.split()
    start, end = (int(part, 16) for part in where.split('-'))
    if '/psm_' in line or '/dev/shm' in line:
        if rights == 'r--p':
            assert libc.mprotect(ctypes.c_void_p(start), 4096, 3) == 0
            window(start)[0] = b'!'
            result = [bytes(window(start))]
        else:
            # The EPCM: shared, and its descriptor was read-only.
            assert rights == 'r--s', line
            result = [*result, libc.mprotect(ctypes.c_void_p(start), 4096, 3), ctypes.get_errno()]
"""
    before = bytes(enclave.bench.pages)
    assert enclave.call(code) == [b"!", -1, 13]
    assert bytes(enclave.bench.pages) == before


def test_children_have_no_enclave_pages(enclave: Any) -> None:
    code = """
import os
view = context.view('handler.py')
pid = os.fork()
if pid == 0:
    view[0]
    os._exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
    assert enclave.call(code) == -signal.SIGSEGV


# ------------------------------------------------------------------------------------ how calls end


@pytest.mark.parametrize(
    ("code", "kind", "name", "fact"),
    [
        ("raise ValueError('odd')", "raise", "ValueError", "odd"),
        ("import json; json.loads('{')", "raise", "json.decoder.JSONDecodeError", "line 1"),
        ("raise KeyboardInterrupt", "raise", "KeyboardInterrupt", ""),
        ("import sys; sys.exit(3)", "exit", "SystemExit", "3"),
        ("result = {1, 2}", "result", "enturbo.runtime.messages.MessageError", "builtins.set"),
        (f"result = bytes({MAX_FRAME})", "result", "enturbo.runtime.messages.MessageError", str(MAX_FRAME)),
        ("def f(): f()\nf()", "raise", "RecursionError", "recursion"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1/0})", "raise", "E", "could not be made"),
        ("raise ValueError('\\ud800')", "raise", "ValueError", "\\ud800"),
        ("import sys; sys.stdout.close(); 1/0", "raise", "ZeroDivisionError", "division"),
        ("import sys; sys.stdout = None; 1/0", "raise", "ZeroDivisionError", "division"),
    ],
)
def test_errors(enclave: Any, code: str, kind: str, name: str, fact: str) -> None:
    reply = enclave.reply(code)
    assert (reply["error"], reply["kind"]) == (1, kind)
    assert reply["type"] == name
    assert fact in reply["message"]
    assert 0 < reply["first"] <= reply["end"]
    assert enclave.call("result = 'alive'") == "alive"


def test_the_manifest_waits_for_the_gate(bench: Any) -> None:
    enclave = bench.enclave(EVAL, valid=False, gate_timeout=0.05)
    reply = enclave.reply("result = 1")
    assert (reply["kind"], reply["first"]) == ("gate", 0)
    assert "0x0" in reply["message"]
    enclave.set_all("valid")
    assert enclave.call("result = 1") == 1


def test_a_damaged_manifest(bench: Any) -> None:
    enclave = bench.enclave(EVAL, valid=False)
    enclave.page(0)[0] ^= 1
    enclave.set_all("valid")
    reply = enclave.reply()
    assert (reply["kind"], reply["type"]) == ("raise", "enturbo.shm.errors.ImageFormatError")


def test_globals_live_on_between_calls(bench: Any) -> None:
    enclave = bench.enclave(
        "seen = []\ndef handler(event, context):\n    seen.append(event)\n    return seen"
    )
    assert enclave.call(1) == [1]
    assert enclave.call(2) == [1, 2]


def test_output_comes_before_the_result(enclave: Any) -> None:
    enclave.call("import sys; print('out'); print('err', file=sys.stderr)")
    assert os.read(enclave.stdout, 100) == b"out\n"
    assert os.read(enclave.stderr, 100) == b"err\n"


def test_a_forked_child_that_returns_answers_nothing(enclave: Any) -> None:
    for code in ("import os; result = os.fork()", "import os\nif os.fork() == 0: raise ValueError('child')"):
        enclave.call(code)
        assert enclave.call("result = 'next'") == "next"


def test_threads_may_stay(enclave: Any) -> None:
    enclave.call("import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()")
    assert enclave.call("result = 'next'") == "next"


def test_a_closed_launch_socket_ends_the_process(bench: Any) -> None:
    enclave = bench.enclave(EVAL)
    enclave.call("import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start()")
    enclave.stream.sock.shutdown(2)
    assert wait_pidfd(enclave.process.pidfd, 20)
    assert enclave.end()
    assert enclave.process.returncode == 0


# ------------------------------------------------------------------------------------ how they end


def test_an_end_is_final_and_told(bench: Any) -> None:
    enclave = bench.enclave(EVAL)
    enclave.call("result = 1")
    assert enclave.end()
    assert enclave.process.returncode == -signal.SIGKILL
    assert wait_pidfd(enclave.process.pidfd, 0)
    assert not Path(f"/proc/{enclave.process.pid}").exists()
    with pytest.raises(StreamClosed):
        enclave.recv()
    assert enclave.end()  # once more: it is gone


def test_its_exit_status_is_kept(bench: Any) -> None:
    enclave = bench.enclave(EVAL)
    enclave.send("import os; os._exit(7)")
    assert wait_pidfd(enclave.process.pidfd, 20)
    assert enclave.end()
    assert enclave.process.returncode == 7


def test_descendants_end_with_their_enclave(bench: Any) -> None:
    enclave = bench.enclave(EVAL)
    pids = [enclave.call(CHILD) for _ in range(3)]
    assert all(map(alive, pids))
    assert enclave.end()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_who_detaches_is_killed_on_sight(enclave: Any, until: Until) -> None:
    pid = enclave.call(DETACH)
    until(lambda: not alive(pid))
    assert enclave.call("result = 'alive'") == "alive"


def test_two_that_detach_end_apart(bench: Any, until: Until) -> None:
    one, other = bench.enclave(EVAL), bench.enclave(EVAL)
    ones, others = one.call(CHILD), other.call(CHILD)
    detached = [one.call(DETACH), other.call(DETACH)]
    assert one.end()
    assert not alive(ones)
    assert not alive(detached[0])
    assert alive(others)
    assert other.call("result = 'alive'") == "alive"
    assert other.end()
    until(lambda: not any(map(alive, [others, *detached])))
    assert carriers(bench.zygote.token) == [bench.zygote.pid]


def test_a_chain_of_forks_ends(bench: Any) -> None:
    """A process that always runs on in a new child is outrun."""
    enclave = bench.enclave(EVAL)
    enclave.call("import os\nif os.fork() == 0:\n    while os.fork() == 0: pass\n    os._exit(0)")
    assert enclave.end()
    assert carriers(bench.zygote.token) == [bench.zygote.pid]


def test_the_zygotes_death_ends_enclaves(bench: Any, monkeypatch: pytest.MonkeyPatch, until: Until) -> None:
    zygote = Zygote()
    monkeypatch.setattr(bench, "zygote", zygote)
    enclave = bench.enclave(EVAL)
    child, token = enclave.call(CHILD), zygote.token
    first = zygote.pid
    os.kill(first, signal.SIGKILL)
    assert wait_pidfd(enclave.process.pidfd, 20)
    assert alive(child)  # only the main process dies with its parent; the token finds the rest
    assert enclave.end()
    assert not alive(child)
    assert carriers(token) == []
    assert not zygote.alive
    again = bench.enclave(EVAL)
    assert again.call("result = 1") == 1
    assert zygote.pid != first
    assert again.end()
    assert zygote.close(20)


def test_a_zygote_that_does_not_answer_is_replaced(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    zygote = Zygote()
    monkeypatch.setattr(bench, "zygote", zygote)
    zygote.modules(20)
    os.kill(zygote.pid, signal.SIGSTOP)
    with pytest.raises(ZygoteLost):
        zygote.modules(0.05)
    assert zygote.modules(20)
    assert zygote.close(20)


def test_close_leaves_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what earlier tests left in cycles is not to be closed in the middle of this one
    before = set(os.listdir("/proc/self/fd"))
    zygote = Zygote()
    assert (zygote.alive, zygote.pid, zygote.pidfd, zygote.fds()) == (False, 0, -1, [])
    monkeypatch.setattr(bench, "zygote", zygote)
    enclave = bench.enclave(EVAL)
    child, token, pid = enclave.call(CHILD), zygote.token, zygote.pid
    held = zygote.fds()
    assert len(held) == 3
    assert zygote.close(20)
    assert carriers(token) == []
    assert not any(Path(f"/proc/{number}").exists() for number in (child, pid, enclave.process.pid))
    enclave.stream.close()
    for fd in (enclave.stdout, enclave.stderr):
        os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before
    bench._stack.pop_all()
    assert zygote.close(20)
    with pytest.raises(EnturboError, match="closed"):
        zygote.start()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # other fixtures may run threads
def test_a_forked_child_of_the_host_can_let_go(bench: Any) -> None:
    bench.zygote.modules(20)
    pid = os.fork()
    if pid == 0:
        held = bench.zygote.fds()
        bench.zygote.forget()
        os._exit(0 if held and not any(map(is_open, held)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert bench.zygote.modules(20)


HOST = """
import os, signal, socket, sys, time
from multiprocessing.shared_memory import SharedMemory
from enturbo.runtime.processes import EnclaveSpec, Run, Zygote
zygote = Zygote()
segments = [SharedMemory(create=True, size=4096) for _ in range(2)]
for segment in segments:
    segment.unlink()
ours, theirs = socket.socketpair()
out = os.open("/dev/null", os.O_RDWR)
fds = [os.open(f"/proc/self/fd/{segment._fd}", os.O_RDONLY) for segment in segments]
spec = EnclaveSpec(1, 0, 1, 1, (Run(0, 0, 1, 3, False, 0),))
pids = [zygote.spawn(spec, segments[0]._fd, *fds, theirs, out, out, 20).pid for _ in range(2)]
child = os.fork()
if child == 0:
    time.sleep(1000)
print(zygote.token, child, zygote.pid, *pids, flush=True)
time.sleep(1000)
"""


def test_the_hosts_death_ends_everything_though_a_fork_of_it_lives(until: Until) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    token, child, *pids = host.stdout.readline().split()
    try:
        assert all(alive(int(pid)) for pid in pids)
        host.kill()
        host.wait(20)
        end = time.monotonic() + 1.0
        until(lambda: not any(alive(int(pid)) for pid in pids))
        assert time.monotonic() < end
        assert alive(int(child))
        assert carriers(token) == []
    finally:
        host.stdout.close()
        os.kill(int(child), signal.SIGKILL)
        host.kill()


def test_strays_are_found_by_their_token_alone(until: Callable[[Callable[[], bool]], None]) -> None:
    processes = [
        subprocess.Popen(["sleep", "1000"], env={**os.environ, TOKEN: token})
        for token in ("0" * 32, "1" * 32)
    ]
    try:
        # Popen returns in the middle of exec, a moment before the new program's environment can be read.
        until(lambda: all(Path(f"/proc/{process.pid}/environ").read_bytes() for process in processes))
        assert kill_strays("0" * 32, 20)
        assert processes[0].wait(20) == -signal.SIGKILL
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()
