"""What every stage script shares: exit codes, the record of a run, the check for stale inputs."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from syntriever import jsonl, paths
from syntriever.errors import BadInput, Failed

PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "faiss-cpu", "beir", "openai", "numpy")


def run(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> int:
    """Exit code of a stage: 0 complete, 1 failed while running, 2 bad input, 130 interrupted."""
    # Set before any heavy import: the libraries read them once. Progress bars are ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        main(parse_args())
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; what is complete was kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def say(*words: object) -> None:
    """Print a line at once, also when the output is piped."""
    print(*words, flush=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(value: Any) -> str:
    """Hash of a JSON value, the same for the same content whatever the key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Record:
    """How an output was made; written to `run.json` when the stage is done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.started = time.time()
        self.options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.inputs: dict[str, dict[str, Any]] = {}

    def reads(self, *files: Path) -> None:
        """Note the hash of each input file, as it is now."""
        for path in files:
            # Taken before hashing, so that a later change can only cause a needless rehash.
            state = path.stat()
            self.inputs[paths.shown(path)] = {
                "size": state.st_size,
                "mtime_ns": state.st_mtime_ns,
                "sha256": sha256(path),
            }

    def write(self, output: Path, **results: Any) -> None:
        """Write the `run.json` of `output` (a folder's own, or beside a file)."""
        jsonl.write_json(
            paths.run_json(output),
            {
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "options": self.options,
                "results": results,
                "inputs": self.inputs,
                "versions": versions(),
                "git_commit": git_commit(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "wall_seconds": round(time.time() - self.started, 2),
            },
        )


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
        return dict(json.loads(path.read_bytes()))
    except ValueError as error:
        raise BadInput(f"{paths.shown(path)}: not JSON ({error}); run the stage that made it again") from None


def check_fresh(outputs: Iterable[Path], force: bool) -> None:
    """Refuse an input whose own inputs have changed since it was made (`--force` goes on).

    Raises `BadInput` that names the stale file, what changed and the command that mends it.
    """
    for output in outputs:
        record = load_record(output)
        if record is None:
            continue
        for name, was in record["inputs"].items():
            path = paths.home() / name
            if not path.is_file():
                continue
            now = path.stat()
            same = (now.st_size, now.st_mtime_ns) == (was["size"], was["mtime_ns"])
            if not same and sha256(path) != was["sha256"]:
                message = f"{paths.shown(output)} is stale: {name} has changed since it was made"
                command = " ".join(record["command"])
                if not force:
                    raise BadInput(f"{message}.\nRun again: python {command}   (or pass --force to go on)")
                say(f"warning: {message}; going on because of --force")
            # A checkpoint's weights are judged by the record of their folder.
            check_fresh([path.parent if path.suffix == ".safetensors" else path], force)


def next_command(*words: str) -> None:
    say("next:  " + " ".join(words))
