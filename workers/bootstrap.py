"""How a process of ours starts: which interpreter, which modules it may see, which environment.

A child runs ``python -P -S -c BOOTSTRAP``: the user's ``__main__`` is not imported again, so the library
works in scripts without a guard, in ``python -c``, in threads and in web servers. Its search path is the
standard library alone. Of everything installed it sees the named packages and no others, each pinned to the
folder in which the host found it: never the caller's folder, no .pth hook, no editable finder.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from typing import Final, NamedTuple

from ..shm.errors import EnturboError

# Arguments: module, number of pins, name=folder …, then what module.main() gets.
BOOTSTRAP: Final = """
import sys
from importlib.machinery import PathFinder
class Pinned:
    def __init__(self, folders): self.folders = folders
    def find_spec(self, name, path=None, target=None):
        folder = self.folders.get(name)
        return None if folder is None else PathFinder.find_spec(name, [folder])
module, count = sys.argv[1], int(sys.argv[2])
pins, arguments = sys.argv[3:3 + count], sys.argv[3 + count:]
sys.meta_path.insert(0, Pinned(dict(pin.split("=", 1) for pin in pins)))
sys.argv[:] = [module]
__import__(module)
sys.modules[module].main(*arguments)
"""

# Of the embedding process's environment an enclave gets what an interpreter needs to start and to speak
# the same language; the rest is unmeasured input at best, and its secrets at worst.
_PLATFORM_NAMES: Final = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "PYTHONHOME"})
_PLATFORM_PREFIXES: Final = ("LC_", "LD_", "DYLD_")


class Command(NamedTuple):
    """What to give to :class:`subprocess.Popen`."""

    argv: list[str]
    env: dict[str, str]


def child_command(
    module: str,
    arguments: Sequence[str],
    packages: Sequence[str],
    *,
    whole_environment: bool = True,
    extra: Mapping[str, str] | None = None,
) -> Command:
    """The command that runs ``module.main(*arguments)`` with ``packages`` and ``enturbo`` importable.

    ``whole_environment=False`` passes only what the platform needs; PYTHON… variables other than PYTHONHOME
    are never passed. Raises EnturboError if there is no interpreter or a package cannot be found.
    """
    if not sys.executable:
        raise EnturboError("sys.executable is empty: this embedding names no Python interpreter to start")
    pins = [f"enturbo={own_folder()}", *(f"{name}={package_folder(name)}" for name in packages)]
    argv = [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", BOOTSTRAP]
    env = {
        name: value
        for name, value in os.environ.items()
        if name == "PYTHONHOME" or (not name.startswith("PYTHON") and (whole_environment or _platform(name)))
    }
    return Command([*argv, module, str(len(pins)), *pins, *arguments], {**env, **(extra or {})})


def own_folder() -> str:
    """The folder that holds the ``enturbo`` which runs here."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def package_folder(name: str) -> str:
    """The folder that holds the installed package ``name``; the caller's folder comes last.

    A module of the same name beside the user's script is not the package. Raises EnturboError.
    """
    caller = {os.path.abspath(""), os.path.dirname(os.path.abspath(_main_file()))}
    searched = [os.path.abspath(entry) for entry in sys.path if entry]
    folders = [own_folder(), *(entry for entry in searched if entry not in caller)]
    folders += [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *caller]
    for folder in folders:
        spec = PathFinder.find_spec(name, [folder])
        if spec is not None and spec.submodule_search_locations is not None and spec.origin is not None:
            return folder
    raise EnturboError(f"the package {name!r} cannot be found in any of {', '.join(folders)}")


def _main_file() -> str:
    return str(getattr(sys.modules.get("__main__"), "__file__", None) or "")


def _platform(name: str) -> bool:
    return name in _PLATFORM_NAMES or name.startswith(_PLATFORM_PREFIXES)
