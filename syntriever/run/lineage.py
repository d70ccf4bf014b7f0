"""What every stage script shares: exit codes, the record of a run, the check for stale inputs."""

import argparse
import hashlib
import itertools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import cli, terminal

_ENCODERS = ("torch", "transformers", "sentence-transformers", "peft", "datasets", "faiss-cpu", "beir", "numpy")
PACKAGES = (*_ENCODERS, "openai", "xllamacpp")


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

    def differs(self, output: Path, settings: dict[str, Any]) -> str:
        """What of the `settings` and of the hashes of what was read is not as it was when `output` was made, or nothing."""
        self.settings = settings | {name: read["sha256"][:12] for name, read in self.inputs.items()}
        if not output.is_file() or not output.stat().st_size:
            return ""
        was = (load_record(output) or {}).get("settings")
        if was is None:
            return f"{paths.shown(output)} was not made by this script (no {paths.run_json(output).name} beside it)"
        pairs = ((name, was.get(name), self.settings.get(name)) for name in {**was, **self.settings})
        changed = "; ".join(f"{name} was {then!r} and is now {now!r}" for name, then, now in pairs if then != now)
        return f"{paths.shown(output)} was made with other settings: {changed}" if changed else ""

    def resumes(self, output: Path, settings: dict[str, Any], force: bool, dry_run: bool = False) -> bool:
        """Whether `output` exists and can be appended to: it was made under the same `settings`.

        Otherwise `BadInput` names what changed; `force` sets the old file aside. Changed inputs
        (`reads`) count as changed settings. From here on until `write`, the output is unfinished;
        with `dry_run` nothing is touched, and it is as if forced.
        """
        resumed = output.is_file() and output.stat().st_size > 0
        message = self.differs(output, settings)
        if resumed:
            if not dry_run:
                jsonl.mend(output)
            names = itertools.chain([f"{output.name}.old"], (f"{output.name}.old{n}" for n in itertools.count(2)))
            aside = next(path for path in map(output.with_name, names) if not path.exists())
            if message and not (force or dry_run):
                kept = f"the old file is kept as {aside.name}, and replies that are in the ledger are not paid again"
                raise BadInput(f"{message}.\nPass --force to start anew: {kept}")
            if message:
                resumed = False
                terminal.say(f"note:  {message}; " + ("--force starts anew" if dry_run else f"it is kept as {aside.name}"))
                if not dry_run:
                    output.rename(aside)
                    if paths.run_json(output).is_file():
                        paths.run_json(output).rename(paths.run_json(aside))
        if not dry_run:
            self.write(output, complete=False)
        return resumed

    def write(self, output: Path, complete: bool = True, **results: Any) -> None:
        """Write the `run.json` of `output` (a folder's own, or beside a file)."""
        jsonl.write_json(
            paths.run_json(output),
            {
                "command": [cli.script(), *sys.argv[1:]],
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


def started_from(output: Path) -> str | None:
    """The model that a checkpoint is trained from or a file is retrieved by, as it was typed, also of a training that was
    interrupted; else None."""
    record, begun = load_record(output), output.with_name(f".{output.name}.tmp").glob("checkpoint-*/state.json")
    made = [record["options"]] if record else [json.loads(path.read_bytes())["settings"] for path in begun]
    return made[0].get("model") if made else None


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
                raise BadInput(f"{problem}.\nRun again: {remedy(record)}   (or pass --force to go on)")
            terminal.say(f"warning: {problem}; going on because of --force")
            forced.append(problem)
        forced += check_fresh((paths.home() / name for name in record["inputs"]), force, seen)
    return forced


def remedy(record: dict[str, Any]) -> str:
    """The command that makes an output anew. To a stage that appends to its output, changed inputs are other settings."""
    anew = ["--force"] if record["complete"] and record["settings"] and "--force" not in record["command"] else []
    return terminal.command(*record["command"], *anew)


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
