"""The command line of a stage: exit codes and strict parsing."""

import argparse
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed, Waiting
from syntriever.files import paths
from syntriever.run import processes, terminal


def run(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> int:
    """Exit code of a stage: 0 complete, 1 failed while running, 2 bad input, 75 come back later (the
    EX_TEMPFAIL of sysexits), 130 interrupted."""
    # Set before any heavy import: the libraries read them once. Progress bars are ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        main(parse_args())
        processes.wait()  # torchrun gives up on a node whose processes are gone while another still writes
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Waiting as waiting:
        print(f"waiting: {waiting}", file=sys.stderr)
        return 75
    except OSError as error:
        print(f"failed: {error.filename or 'writing'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except sqlite3.Error as error:  # of the indexes in temporary files
        print(f"failed: temporary file: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"\ninterrupted: {str(error) or 'what is complete was kept, run the same command to go on'}", file=sys.stderr)
        return 130
    return 0


def parser(doc: str) -> argparse.ArgumentParser:
    """Strict parser of a script, described by its docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, **paper: Any) -> argparse.Namespace:
    """Arguments of a script with `--paper`: the settings of the paper, where nothing else is said."""
    said = ", ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in paper.items())
    parser.add_argument("--paper", action="store_true", help=f"the paper's settings, each of which may be overridden: {said}")
    if parser.parse_known_args(argv)[0].paper:
        parser.set_defaults(**paper)
    return parser.parse_args(argv)


def script() -> str:
    """The running script as the user would name it from the root of the repository."""
    path = Path(sys.argv[0]).resolve()
    return str(path.relative_to(paths.CODE)) if path.is_relative_to(paths.CODE) else str(path)


def numbers(text: str) -> list[int]:
    """Type of an option: whole numbers from 1, separated by commas; each once, in ascending order."""
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers from 1, separated by commas")
    return sorted({int(part) for part in text.split(",")})


def number(group: argparse._ActionsContainer, option: str, kind: type, default: float, what: str) -> None:
    """An option that is a number, and whose help ends with its default."""
    group.add_argument(option, type=kind, default=default, help=f"{what} (default: %(default)s)")


def at_most(option: str, typed: int | None, default: int, most: int, where: str) -> int:
    """What an option was set to, or its default. Where that is more than the `most` that `where` has, a default is
    cut, which is said, and what was typed is `BadInput`."""
    if typed is not None and not 1 <= typed <= most:
        raise BadInput(f"{option} {typed}: {where} has {most} passages")
    if typed is None and default > most:
        terminal.say(f"note:  {option} is {most} instead of {default}: {where} has no more passages")
    return min(default, most) if typed is None else typed


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """`BadInput` where one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} must be positive, not {value}")
