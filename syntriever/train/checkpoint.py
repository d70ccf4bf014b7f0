"""Checkpoints of a training run: complete or not there, safetensors and JSON only, resumed exactly."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import lineage, processes, terminal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Options that may differ between the run that was interrupted and the one that goes on.
FREE = {"resume", "device", "force", "save_minutes", "compile", "mini_batch_size", "save_adapter"}


def settings_of(record: lineage.Record) -> dict[str, Any]:
    """What has to be the same for a run to be continued: options and the content of the inputs."""
    options = {name: value for name, value in record.options.items() if name not in FREE}
    return options | {name: read["sha256"][:12] for name, read in record.inputs.items()}


def latest(work: Path, settings: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint in `work`, or None. Torn ones are named and passed over.

    Raises `BadInput` that names the setting where it was made under others than `settings`.
    """
    for folder in sorted(work.glob("checkpoint-*"), key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_bytes())
            whole = all(lineage.sha256(folder / name) == wanted for name, wanted in state["sha256"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            terminal.say(f"note:  {paths.shown(folder)} is torn; it is passed over")
            continue
        was = state["settings"]
        changed = [name for name in sorted({*was, *settings}) if was.get(name) != settings.get(name)]
        if changed:
            named = "; ".join(f"{name} was {was.get(name)!r} and is now {settings.get(name)!r}" for name in changed)
            raise BadInput(f"--resume: the interrupted run was made with other settings: {named}")
        return folder
    return None


def find(output: Path, record: lineage.Record, args: Any) -> Path | None:
    """With `--resume` the checkpoint of the interrupted run of `output` to go on from, if there is one."""
    work, old = output.with_name(f".{output.name}.tmp"), output.with_name(f".{output.name}.old")
    if processes.rank() == 0:
        if old.is_dir() and not output.exists():
            old.rename(output)  # killed in the middle of `swap`
        for left in work.glob(".*"):  # temporary files of a killed run
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    if args.resume:
        found = latest(work, settings_of(record))
        if found is None:
            terminal.say("note:  no interrupted run of these settings is there; starting from the beginning")
        return found
    if next(work.glob("checkpoint-*"), None):
        terminal.say(f"note:  an interrupted run is in {paths.shown(work)}; --resume would go on with it, this starts anew")
    return None


def swap(work: Path, output: Path) -> None:
    """Put the finished checkpoint at `output`. What a resumed run needs goes last."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.is_dir():
        output.rename(old)
    work.rename(output)
    for left in (*output.glob("checkpoint-*"), *output.glob("best-*.safetensors"), *output.glob("start.safetensors")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    shutil.rmtree(old, ignore_errors=True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training may change of a model's state: all but its frozen parameters."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set some weights of a model; one that it does not have is an error."""
    model.load_state_dict({**model.state_dict(), **weights})


def save(work: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` and then remove the older ones. It appears under its name only when
    all of it is on disk; `state.json` has the hash of the tensors."""
    from safetensors.torch import save as serialize

    tensors = {f"model.{name}": value.clone() for name, value in trained(model).items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    folder = work / f"checkpoint-{step}"
    temporary = work / f".checkpoint-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    data = serialize({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    with jsonl.atomic(temporary / "state.safetensors") as file:
        file.write(data)
    hashes = {"state.safetensors": hashlib.sha256(data).hexdigest()}
    jsonl.write_json(temporary / "state.json", {**state, "step": step, "sha256": hashes})
    shutil.rmtree(folder, ignore_errors=True)  # a torn one of the same step
    temporary.rename(folder)
    for old in work.glob("checkpoint-*"):
        if old != folder:
            shutil.rmtree(old)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint into a model and its optimiser; its `state.json`."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "state.safetensors")
    own = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    put(model, own)
    values: dict[int, dict[str, Tensor]] = {}
    for _, number, name in (name.split(".") for name in tensors if name.startswith("optimizer.")):
        values.setdefault(int(number), {})[name] = tensors[f"optimizer.{number}.{name}"]
    optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    return state
