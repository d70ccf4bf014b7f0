"""Several processes on one run (torchrun): who does what, and sums across them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from syntriever.errors import BadInput, Failed
from syntriever.files.paths import home, shown

if TYPE_CHECKING:
    import torch


@contextmanager
def lock(path: Path, dry_run: bool = False) -> Iterator[None]:
    """One writer per output. The kernel drops the lock with its owner, so a dead owner blocks nobody.
    Of the processes of one run (torchrun) the first holds it."""
    if dry_run or rank():
        yield
        return
    path, locks = path.resolve(), home() / ".locks"  # one lock for a file, however the user names it
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / shown(path).replace("/", "_")).open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInput(f"{shown(path)} is being written by process {file.read().decode()}; wait for it or stop it") from None
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except OSError as error:
            raise Failed(f"cannot write {shown(Path(file.name))}: {error.strerror}") from error
        yield


def rank() -> int:
    """Number of this process; 0 writes files and talks."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str | None) -> str | None:
    """Join the other processes of `torchrun`; the device of this one, where `device` was asked for."""
    if world() == 1:
        return device
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available() and device != "cpu"
    if not distributed.is_initialized():
        # The others wait while process 0 scores the dev split or embeds the reference.
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    return device


def add_up(tensor: torch.Tensor) -> None:
    """Replace a tensor by its sum over all processes."""
    if world() > 1:
        from torch import distributed

        distributed.all_reduce(tensor)


def largest(value: int, device: torch.device) -> int:
    """The largest value that any process has."""
    if world() == 1:
        return value
    import torch
    from torch import distributed

    found = torch.tensor(value, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def collect(arrays: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """In process 0 the arrays of the others, which have the same shapes, one process after another; nothing
    in the others."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    own = [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    if rank():
        for tensor in own:
            distributed.send(tensor, 0)
        return
    for other in range(1, world()):
        received = [torch.empty_like(tensor) for tensor in own]
        for tensor in received:
            distributed.recv(tensor, other)
        yield [tensor.cpu().numpy() for tensor in received]


def from_first(value: Any) -> Any:
    """The value that process 0 has, in every process."""
    if world() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def wait() -> None:
    """Return when all processes that have started are here."""
    if world() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.barrier()
