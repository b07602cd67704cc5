"""A handler that does all kinds of things before it is measured, and attacks nobody."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Any

from . import kit
from .kit import note


def work(to: dict[str, Any]) -> str:
    """Lines of several writers, OCALLs, and files in the scratch folder; the folder."""
    scratch = tempfile.gettempdir()

    def write(number: int) -> None:
        for line in range(to["lines"]):
            os.write(1, f"{number} {line}\n".encode())

    def say() -> None:
        for word in range(to["words"]):
            assert kit.context.ocall("say", word) == word

    def make(number: int) -> None:
        note(f"comes {number}")
        os.mkdir(os.path.join(scratch, f"made {number}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(to["writers"])]
    threads.append(threading.Thread(target=say))
    threads += [threading.Thread(target=make, args=(number,)) for number in range(to["writers"])]
    for thread in threads:
        thread.start()
    for line in range(to["words"]):
        with open(os.path.join(scratch, "log"), "a") as file:
            file.write(f"{line}\n")
    for thread in threads:
        thread.join()
    return scratch
