"""Pictures: axes side by side in a PNG that appears whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syntriever.files import jsonl
from syntriever.report import metrics
from syntriever.report.metrics import Measures


@contextmanager
def picture(path: Path, title: str, columns: int, size: tuple[float, float], **layout: Any) -> Iterator[Any]:
    """Axes to draw on; `size` in inches. The file is written when the block ends well."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(1, columns, **layout)
    figure.suptitle(title)
    with jsonl.atomic(path) as file:
        figure.savefig(file, dpi=110, format="png")


def compare(table: dict[str, Measures], ks: tuple[int, ...], name: str, path: Path, title: str) -> None:
    """nDCG at every cut-off for each model, the measure `name` query by query, and the last two models
    against each other."""
    pair = list(table)[-2:]
    with picture(path, title, 1 + len(pair), (5 * (1 + len(pair)), 4)) as axes:
        curves, queries = axes[:2]
        for model, measures in table.items():
            curves.plot(range(len(ks)), [metrics.mean(measures[f"nDCG@{k}"]) for k in ks], marker="o", label=model)
            queries.plot(sorted(measures[name].values(), reverse=True), label=model)
        curves.set(xticks=range(len(ks)), xticklabels=ks, xlabel="k", title="nDCG@k", ylim=(0, 1))
        queries.set(xlabel="queries, each curve sorted by itself", title=f"{name} per query", ylim=(0, 1.02))
        curves.legend()
        if len(pair) > 1:
            old, new = (list(table[model][name].values()) for model in pair)
            won, lost = (sum(sign * a > sign * b for a, b in zip(new, old, strict=True)) for sign in (1, -1))
            axes[2].scatter(old, new, s=12, alpha=0.35, linewidths=0)
            axes[2].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
            axes[2].set(xlabel=pair[0], ylabel=pair[1], title=f"{name}: {won} won, {lost} lost")
            axes[2].set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
