"""The table and the picture of runs/study.sh: each row over its seeds, and its difference to another row.

Reads    results/<row>-s<seed>-{sft,final}_<dataset>_test.json, output/*/log.jsonl, datasets/<dataset>/qrels/train.tsv
Writes   results/study_<model>_<dataset>.md, .png
Run      python runs/study_table.py scifact minilm minilm-gold-sft minilm-snn-sft:minilm-gold-sft --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from syntriever.data import dataset
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.report.pictures import picture
from syntriever.run import cli, terminal

MEASURE = "nDCG@10"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("dataset")
    parser.add_argument("model", help="the untrained encoder")
    parser.add_argument("rows", nargs="+", metavar="row[:other]", help="and what it is compared with (default: the first row)")
    parser.add_argument("--seeds", nargs="+", required=True)
    return parser.parse_args(argv)


def seeded(name: str, seed: str) -> str:
    """minilm-gold-sft, 1 -> minilm-gold-s1-sft: the short name of a run."""
    base, _, stage = name.rpartition("-")
    return f"{base}-s{seed}-{stage}"


def scores_of(name: str, ds: str) -> dict[str, float]:
    path = paths.result(name, ds, "test", ".json")
    if not path.is_file():
        raise BadInput(f"{paths.shown(path)} is not there. Run: runs/study.sh")
    found = json.loads(path.read_text())
    return {query: values[MEASURE] for query, values in found["per_query"].items()}


def difference(ours: np.ndarray, theirs: np.ndarray, rounds: int = 10_000) -> tuple[float, float, float]:
    """Mean of ours - theirs, (seeds, queries) each, and its 95% bootstrap interval over queries and,
    of either side by itself, over seeds."""
    rng = np.random.default_rng(0)
    drawn = np.empty(rounds)
    for n in range(rounds):
        queries = rng.integers(0, ours.shape[1], ours.shape[1])
        means = [rows[rng.integers(0, len(rows), len(rows))].mean(0)[queries].mean() for rows in (ours, theirs)]
        drawn[n] = means[0] - means[1]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(ours.mean() - theirs.mean()), float(low), float(high)


def shares(names: list[str], ds: str) -> tuple[list[float], list[float]]:
    """Epochs, and the share of the gradient that reaches gold passages, over the seeds of a row."""
    logs = [
        [row for row in jsonl.read(paths.model_output(f"{name}-{ds}") / "log.jsonl") if "gold_share" in row] for name in names
    ]
    return [row["epoch"] for row in logs[0]], np.mean([[row["gold_share"] for row in log] for log in logs], axis=0).tolist()


def draw(ds: str, rows: list[dict[str, Any]], curves: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    size, ratios = (14, max(3.6, 1.2 + 0.28 * len(rows))), [3, 2]
    with picture(path, f"{ds}, test split", 2, size, width_ratios=ratios) as axes:
        for place, row in enumerate(rows):
            axes[0].scatter(row["seeds"], [-place] * len(row["seeds"]), s=14, alpha=0.5, color="tab:blue", linewidths=0)
            axes[0].plot(row["mean"], -place, "|", markersize=14, color="black")
        axes[0].set(xlabel=f"{MEASURE}, a dot for each seed")
        axes[0].set_yticks([-place for place in range(len(rows))], [row["name"] for row in rows])
        axes[0].grid(axis="x", alpha=0.3)
        for name, (epochs, values) in curves.items():
            if min(values) < 1:  # there are written texts in its batches
                axes[1].plot(epochs, values, label=name)
        axes[1].set(xlabel="epoch", ylim=(0, 1.02), title="share of the gradient on texts\nthat reaches gold passages")
        axes[1].figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right center", fontsize=8)


def main(args: argparse.Namespace) -> None:
    ds, model, seeds, asked = args.dataset, args.model, args.seeds, args.rows
    qrels = dataset.load_qrels(ds, "test")
    trained = {p for judged in dataset.load_qrels(ds, "train").values() for p, grade in judged.items() if grade > 0}
    untrained = scores_of(model, ds)
    queries = list(untrained)
    seen = np.array([any(grade > 0 and p in trained for p, grade in qrels[query].items()) for query in queries])
    matrix = {model: np.array([[untrained[query] for query in queries]])}
    for name in (entry.split(":")[0] for entry in asked):
        runs = [scores_of(seeded(name, seed), ds) for seed in seeds]
        matrix[name] = np.array([[run[query] for query in queries] for run in runs])
    first = asked[0].split(":")[0]
    rows, lines = [], [
        f"{ds}, {len(queries)} test queries, {len(seeds)} seeds; {MEASURE}",
        "",
        f"| row | {MEASURE} (sd of seeds) | {(~seen).sum()} unseen | {seen.sum()} seen | difference (95%) | to |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for entry in (f"{model}:{model}", *asked):
        name, _, other = entry.partition(":")
        other, values = other or first, matrix[name]
        by_seed = values.mean(1)
        rows.append({"name": name, "seeds": by_seed.tolist(), "mean": by_seed.mean()})
        spread = f" ({by_seed.std(ddof=1):.4f})" if len(by_seed) > 1 else ""
        parts = [f"{values[:, part].mean():.4f}" if part.any() else "" for part in (~seen, seen)]
        against = "| | |"
        if name != other:
            against = "| {:+.4f} ({:+.4f} to {:+.4f}) | {} |".format(*difference(values, matrix[other]), other)
        lines.append(f"| {name} | {by_seed.mean():.4f}{spread} | {' | '.join(parts)} {against}")
    terminal.say("\n".join(lines))
    target = paths.home() / "results" / f"study_{model}_{ds}"
    with jsonl.atomic(target.with_suffix(".md")) as file:
        file.write("\n".join([*lines, ""]).encode())
    stage1 = [name for name in matrix if name.endswith("-sft")]
    curves = {name: shares([seeded(name, seed) for seed in seeds], ds) for name in stage1}
    draw(ds, rows, curves, target.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
