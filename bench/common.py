"""What the benchmarks of training and retrieval share."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def pydocs() -> list[tuple[str, str, str]]:
    """(id, query, passage) of the standard library's docstrings."""
    pairs = runpy.run_path(str(ROOT / "datasets" / "build_pydocs.py"))["pairs"]
    return list(pairs(Path(sysconfig.get_paths()["stdlib"])))


def machine() -> dict[str, Any]:
    import torch

    from syntriever.run import lineage

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"device": name, "threads": torch.get_num_threads(), "versions": lineage.versions()}


def run(
    parts: dict[str, Callable[[Path], dict[str, Any]]],
    chosen: Iterable[str],
    target: Path,
    fill: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Run the chosen parts (none: all) in a temporary folder; each is written to `target` when it is done."""
    results: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        results = json.loads(target.read_text())
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        for name in chosen or parts:
            results[name] = {**parts[name](Path(folder)), **machine()}
            print(f"{name}: ratio {results[name]['ratio']:.2f}", flush=True)
            target.write_text(json.dumps(results, indent=1) + "\n")
