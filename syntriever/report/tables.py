"""The measures of an evaluation as they are printed."""

from typing import Any

from syntriever.data import dataset, download
from syntriever.report import metrics
from syntriever.report.metrics import Measures
from syntriever.run import terminal


def main_of(ks: tuple[int, ...]) -> str:
    """The measure that tests and pictures are about: nDCG@10, or the nearest cut-off there is."""
    return f"nDCG@{min(ks, key=lambda k: (abs(k - 10), k))}"


def columns(ks: tuple[int, ...]) -> list[str]:
    """The measures that are shown; all are in the result files."""
    return [*(f"nDCG@{k}" for k in ks), f"MAP@{max(ks)}", f"Recall@{max(ks)}", f"MRR@{main_of(ks).split('@')[1]}"]


def print_table(
    data: Any, split: str, table: dict[str, Measures], ks: tuple[int, ...], tests: list[tuple[str, str, dict[str, float]]]
) -> None:
    """Print the models side by side. `data` has its name, judgements, and what there is to say of these."""
    width = max(map(len, table)) + 2
    own = "; a query's own passage is left out" if data.name in dataset.SELF_RETRIEVAL else ""
    terminal.say(f"\n{data.name}, {split} split, mean over {len(data.qrels)} queries (a query without results counts 0{own})")
    terminal.say("".ljust(width) + "".join(column.rjust(11) for column in columns(ks)))
    for model, measures in table.items():
        terminal.say(model.ljust(width) + "".join(f"{metrics.mean(measures[column]):11.4f}" for column in columns(ks)))
    if tests:
        terminal.say(f"\npaired test on {main_of(ks)}: difference [95% bootstrap interval], two-sided p of a randomisation test")
    for new, old, test in tests:
        terminal.say(f"{new} - {old}: {test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p']:.4f}")
    for line in data.notes:
        terminal.say(line)
    print_summary(data.sizes, "\nindex size by dimension")
    terminal.say()


def summary(
    models: list[str], datasets: list[str], table: dict[str, dict[str, Measures]], ks: tuple[int, ...]
) -> list[list[Any]]:
    """Header, then a row per model: its main measure on every dataset that was named, and the average.
    CQADupStack counts once, with the mean of its forums."""
    name = main_of(ks)
    rows: list[list[Any]] = [["", *datasets, "average"]]
    for model in models:
        of_parts = [[metrics.mean(table[part][model][name]) for part in download.parts(ds)] for ds in datasets]
        values = [sum(values) / len(values) for values in of_parts]
        rows.append([model, *values, sum(values) / len(values)])
    return rows


def sizes(passages: int, encoders: dict[str, dict[str, Any]], table: dict[str, Measures], ks: tuple[int, ...]) -> list[list[Any]]:
    """Header, then a row per prefix that was searched by: dimensions, MB (10^6 bytes) of a flat index in float32, main measure.
    Nothing without prefixes."""
    rows = [
        [row, str(dim), f"{passages * dim * 4 / 1e6:,.2f}", metrics.mean(table[row][main_of(ks)])]
        for row, found in encoders.items()
        if (dim := found.get("cut_to"))
    ]
    return [["", "dimensions", "index, MB", main_of(ks)], *rows] if rows else []


def print_summary(rows: list[list[Any]], title: str) -> None:
    if rows:
        widths = [max(len(str(row[0])) for row in rows) + 2, *(max(11, len(ds) + 2) for ds in rows[0][1:])]
        terminal.say(title)
        for row in rows:
            cells = [cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row]
            terminal.say(cells[0].ljust(widths[0]) + "".join(map(str.rjust, cells[1:], widths[1:])))
