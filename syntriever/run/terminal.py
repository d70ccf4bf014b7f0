"""What a stage says to the person in front of it: lines and progress."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from syntriever.files import paths
from syntriever.run import processes

# Seconds between two lines of progress where the output is a file: each line stays.
PLAIN_SECONDS = 30.0


def say(*words: object) -> None:
    """Print a line at once, also when the output is piped; of several processes, the first talks."""
    if processes.rank() == 0:
        print(*words, flush=True)


def command(script: str, *words: object, **options: object) -> str:
    """The command that runs a script of this project from where the user stands. Options that are None are left out."""
    path: Any = paths.CODE / script
    path = os.path.relpath(path) if Path.cwd().is_relative_to(paths.CODE) else path
    given = [part for name, value in options.items() if value is not None for part in (f"--{name.replace('_', '-')}", value)]
    return shlex.join(map(str, ["python", path, *words, *given]))


def next_command(script: str, *words: object, **options: object) -> None:
    say("next:  " + command(script, *words, **options))


class _Lines:
    """Makes a line of each state of a progress bar, which would rewrite its line on a terminal."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text.strip():
            self._file.write(text.strip("\r\n ") + "\n")

    def flush(self) -> None:
        self._file.flush()


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """A tqdm bar of the first process, for what takes longer than `delay` (2) seconds; where the output is
    no terminal, one plain line every 30 seconds at most."""
    from tqdm import tqdm

    options = {"delay": 2, "disable": processes.rank() > 0, **options}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(sys.stderr), "mininterval": PLAIN_SECONDS, "maxinterval": PLAIN_SECONDS, "ncols": 100}
        options["delay"] = max(options["delay"], PLAIN_SECONDS)
    return tqdm(items, **options)
