"""What every stage script shares: exit codes, the record of a run, the check for stale inputs."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from syntriever import jsonl, parallel, paths
from syntriever.errors import BadInput, Failed, Waiting

PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "faiss-cpu", "beir", "openai", "numpy")


def run(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> int:
    """Exit code of a stage: 0 complete, 1 failed while running, 2 bad input, 75 come back later (the
    EX_TEMPFAIL of sysexits), 130 interrupted."""
    # Set before any heavy import: the libraries read them once. Progress bars are ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        main(parse_args())
        parallel.wait()  # torchrun gives up on a node whose processes are gone while another still writes
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


def say(*words: object) -> None:
    """Print a line at once, also when the output is piped; of several processes, the first talks."""
    if parallel.rank() == 0:
        print(*words, flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(value: Any) -> str:
    """Hash of a JSON value, the same for the same content whatever the key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Record:
    """How an output was made; written to `run.json` when the stage is done. `forced`: what `--force` overrode."""

    def __init__(self, args: argparse.Namespace, forced: Sequence[str] = ()) -> None:
        self.started, self.forced = time.time(), list(forced)
        self.options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.inputs: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}

    def reads(self, *files: Path) -> None:
        """Note the hash of each input file, as it is now, and the settings under which a stage made it."""
        for path in files:
            # Taken before hashing, so that a later change can only cause a needless rehash.
            state = path.stat()
            self.inputs[paths.shown(path)] = {
                "size": state.st_size,
                "mtime_ns": state.st_mtime_ns,
                "sha256": sha256(path),
                "made_with": _made_with(path),
            }

    def resumes(self, output: Path, settings: dict[str, Any], force: bool, dry_run: bool = False) -> bool:
        """Whether `output` exists and can be appended to: it was made under the same `settings`.

        Otherwise `BadInput` names what changed; `force` sets the old file aside. Changed inputs
        (`reads`) count as changed settings. From here on until `write`, the output is unfinished;
        with `dry_run` nothing is touched.
        """
        self.settings = settings | {name: read["sha256"][:12] for name, read in self.inputs.items()}
        resumed = output.is_file() and output.stat().st_size > 0
        if resumed:
            if not dry_run:
                jsonl.mend(output)
            was = (load_record(output) or {}).get("settings")
            if was is None:
                message = f"{paths.shown(output)} was not made by this script (no {paths.run_json(output).name} beside it)"
            else:
                pairs = ((name, was.get(name), now) for name, now in self.settings.items())
                changed = "; ".join(f"{name} was {then!r} and is now {now!r}" for name, then, now in pairs if then != now)
                message = f"{paths.shown(output)} was made with other settings: {changed}" if changed else ""
            names = itertools.chain([f"{output.name}.old"], (f"{output.name}.old{n}" for n in itertools.count(2)))
            aside = next(path for path in map(output.with_name, names) if not path.exists())
            if message and not force:
                raise BadInput(f"{message}.\nPass --force to start anew (the old file is kept as {aside.name})")
            if message:
                say(f"note:  {message}; it is kept as {aside.name}")
                resumed = False
                if not dry_run:
                    output.rename(aside)
        if not dry_run:
            self.write(output, complete=False)
        return resumed

    def write(self, output: Path, complete: bool = True, **results: Any) -> None:
        """Write the `run.json` of `output` (a folder's own, or beside a file)."""
        jsonl.write_json(
            paths.run_json(output),
            {
                "command": [_script(), *sys.argv[1:]],
                "complete": complete,
                "options": self.options,
                "settings": self.settings,
                "results": results,
                "inputs": self.inputs,
                "forced": self.forced,
                "versions": versions(),
                "git_commit": git_commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "wall_seconds": round(time.time() - self.started, 2),
            },
        )


def _script() -> str:
    """The running script as the user would name it from the root of the repository."""
    path = Path(sys.argv[0]).resolve()
    return str(path.relative_to(paths.CODE)) if path.is_relative_to(paths.CODE) else str(path)


def command() -> str:
    """The running command as the user would type it."""
    return shlex.join(["python", _script(), *sys.argv[1:]])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the code, with '+changes' where the tree is edited; None outside a git checkout."""
    git = ["git", "-C", str(paths.CODE)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def load_record(output: Path) -> dict[str, Any] | None:
    """The `run.json` of `output`, or None where it was not made by a stage (the user's own file)."""
    path = paths.run_json(output)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"command", "complete", "options", "settings", "inputs"}:
        raise BadInput(f"{paths.shown(path)}: not the record of a run; run the stage that made it again")
    return record


def check_fresh(outputs: Iterable[Path], force: bool, seen: set[Path] | None = None) -> list[str]:
    """Refuse an input whose own inputs have changed since it was made; with `force` return what is
    wrong, for the `Record`. An input that is gone is no reason to refuse: it may have been removed to save space.

    Raises `BadInput` that names the stale file, what changed and the command that mends it.
    """
    seen, forced = set() if seen is None else seen, []
    for output in outputs:
        record = None if paths.run_json(output) in seen else load_record(output)
        if record is None:
            continue
        seen.add(paths.run_json(output))
        for problem in problems_of(output, record):
            if not force:
                raise BadInput(f"{problem}.\nRun again: python {shlex.join(record['command'])}   (or pass --force to go on)")
            say(f"warning: {problem}; going on because of --force")
            forced.append(problem)
        forced += check_fresh((paths.home() / name for name in record["inputs"]), force, seen)
    return forced


def problems_of(output: Path, record: dict[str, Any]) -> list[str]:
    """Why an output is not what its stage would make now: it is unfinished, or an input has changed
    since, and under which other settings that one was made, if it was."""
    shown = paths.shown(output)
    found = [] if record["complete"] else [f"{shown} is unfinished: its stage was interrupted, or too many of its rows failed"]
    for name, was in record["inputs"].items():
        path = paths.home() / name
        if path.is_file() and _changed(path, was):
            then, now = was.get("made_with") or {}, _made_with(path) or {}
            settings = "; ".join(
                f"{key} was {then[key]!r} and is now {now.get(key)!r}" for key in then if then[key] != now.get(key)
            )
            found.append(f"{shown} is stale: {name} has changed since it was made{f' ({settings})' if settings else ''}")
    return found


def _made_with(path: Path) -> dict[str, Any] | None:
    """Options and settings of the stage that made a file; None where none did."""
    record = load_record(path)
    made = record and record["options"] | record["settings"]
    return made and {name: value for name, value in made.items() if name not in ("force", "resume", "device")}


def _changed(path: Path, was: dict[str, Any]) -> bool:
    now = path.stat()
    same = (now.st_size, now.st_mtime_ns) == (was.get("size"), was.get("mtime_ns"))
    return not same and sha256(path) != was.get("sha256")


def next_command(*words: str) -> None:
    say("next:  " + " ".join(words))


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """Options of the stages that embed a corpus."""
    group = parser.add_argument_group("encoding")
    group.add_argument("--max-length", type=int, help="tokens kept of each text (default: the model's own)")
    group.add_argument(
        "--backend",
        choices=("torch", "compile", "onnx", "onnx-int8"),
        default="torch",
        help="what runs the encoder: onnx and onnx-int8 (quantised, other vectors) are faster on a CPU, compile on a GPU "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--batch-tokens", type=int, help="tokens per forward pass, padding counted (default: what suits the device)"
    )
    group.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the vectors on disk (default: %(default)s)"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--name", help="short name for file names, where the model is a folder or a Hub id")
    group.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    group.add_argument("--force", action="store_true", help="go on where a checkpoint is stale")


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """`BadInput` where one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise BadInput(f"--{name.replace('_', '-')} must be positive, not {value}")


def add_training_options(parser: argparse.ArgumentParser, *, epochs: float, batch_size: int, lr: float) -> None:
    """Options of both training stages."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=epochs, help="passes over the rows (default: %(default)s)")
    group.add_argument(
        "--batch-size", type=int, default=batch_size, help="rows per step, of all processes together (default: %(default)s)"
    )
    group.add_argument("--lr", type=float, default=lr, help="peak learning rate of AdamW (default: %(default)s)")
    group.add_argument(
        "--warmup", type=float, default=0.1, help="share of the steps with rising learning rate (default: %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=0.05, help="tau of the scores cos/tau (default: %(default)s)")
    group.add_argument("--max-length", type=int, help="tokens kept of each text in training (default: the model's own)")
    group.add_argument(
        "--dev-pool", type=int, default=20_000, help="passages drawn beside the judged ones for dev (default: %(default)s)"
    )
    group.add_argument("--dev-queries", type=int, default=1_000, help="dev queries at most (default: %(default)s)")
    group.add_argument(
        "--mini-batch-size",
        type=int,
        help="gradient caching: hold the activations of this many texts at a time, for large batches (default: of all)",
    )
    group.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    group.add_argument(
        "--save-minutes", type=float, default=15, help="minutes between checkpoints, beside epochs (default: %(default)s)"
    )
    group.add_argument("--compile", action="store_true", help="compile the encoder (pays on a GPU, for long runs)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--seed", type=int, default=42, help="seed of order and dropout (default: %(default)s)")
    group.add_argument("--name", help="short name for file names, where the model is a folder or a Hub id")
    group.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    group.add_argument("--force", action="store_true", help="go on where an input is stale")


def check_training_options(args: argparse.Namespace) -> None:
    check_positive(args, "epochs", "batch_size", "lr", "temperature", "max_length", "dev_pool", "dev_queries", "mini_batch_size")
    if not 0 <= args.warmup < 1:
        raise BadInput(f"--warmup is a share between 0 and 1, not {args.warmup}")
