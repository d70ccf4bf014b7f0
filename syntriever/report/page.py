"""The last evaluation as one self-contained HTML page: no script, nothing loaded from elsewhere."""

import base64
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from syntriever.data.dataset import Hits
from syntriever.files import jsonl, paths
from syntriever.report import metrics
from syntriever.report.metrics import Measures
from syntriever.run import cli, lineage

SHOWN = 3  # passages of a query

EXTREMES = 5  # queries on either side

CHARACTERS = 400

Tests = Sequence[tuple[str, str, dict[str, float]]]

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Syntriever: evaluation</title>
<style>
:root { color-scheme: light dark; --line: #8884; --mark: #2a74; --bad: #c33; --good: #283; }
@media (prefers-color-scheme: dark) { :root { --bad: #f77; --good: #6c8; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem 1rem; margin: .7rem 0; }
summary { cursor: pointer; font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
.passage { border-left: 3px solid var(--line); padding-left: .6rem; margin: .4rem 0; font-size: .85rem; overflow-wrap: anywhere; }
.gold { border-color: #2a7; background: var(--mark); }
.good { color: var(--good); } .bad { color: var(--bad); }
svg { max-width: 26rem; width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
img { max-width: 100%; background: white; } small { opacity: .75; }
</style></head><body>
"""


def write(sections: Iterable[str], summary: list[list[Any]], measure: str) -> None:
    """Write `results/report.html`. `summary`: header, then a row per model, or nothing."""
    commit, made = lineage.git_commit() or "not a git checkout", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    how = f"{made}, code {escape(commit[:12])}, <code>{escape(shlex.join(['python', cli.script(), *sys.argv[1:]]))}</code>"
    head = f"<h1>Syntriever: evaluation</h1><p><small>{how}</small></p>"
    overview = f"<h2>{measure} by dataset</h2>" + _table(summary[0], summary[1:]) if summary else ""
    with jsonl.atomic(paths.report_html()) as file:
        file.write((PAGE + head + overview + "".join(sections) + "</body></html>\n").encode("utf-8", "replace"))


def section(
    data: Any,
    split: str,
    table: dict[str, Measures],
    columns: list[str],
    measure: str,
    tests: Tests,
    tops: dict[str, dict[str, Hits]],
    folders: dict[str, Path | None],
) -> str:
    """All about one dataset. `data` has its corpus, queries, judgements and notes on these; `tops` the first passages
    of each query by model; `folders` the checkpoints."""
    rows = [[model, *(metrics.mean(measures[column]) for column in columns)] for model, measures in table.items()]
    parts = [
        f"<h2>{escape(data.name)}, {escape(split)} split</h2>",
        f"<p>Mean over {len(data.qrels)} queries, {len(data.corpus):,} passages. A query without results counts 0.</p>",
        *(f"<p>{escape(note)}</p>" for note in data.notes),
        _table(["", *columns], rows),
        *([_table(data.sizes[0], data.sizes[1:])] if data.sizes else []),
    ]
    trained = [model for model in table if model != "bm25"] or list(table)
    for new, old, test in tests:
        values = {model: table[model][measure] for model in (old, new)}
        opened = " open" if (old, new) == (trained[0], trained[-1]) else ""
        parts.append(
            f"<details{opened}><summary>{escape(new)} against {escape(old)}: {measure} {test['difference']:+.4f} "
            f"[{test['low']:+.4f}, {test['high']:+.4f}], p = {test['p']:.4f}</summary>"
            f"<p><small>Difference of the means, 95% bootstrap interval, two-sided p of a paired randomisation test; "
            f"not corrected for the number of pairs.</small></p>"
            + _scatter(data, values, measure)
            + _extremes(data, values, tops)
            + "</details>"
        )
    for model, folder in folders.items():
        if folder and (folder / "loss.png").is_file():
            picture = base64.b64encode((folder / "loss.png").read_bytes()).decode()
            parts.append(f'<h3>Training of {escape(model)}</h3><img alt="loss curves" src="data:image/png;base64,{picture}">')
    return "\n".join(parts)


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers to four digits, the best of a column bold; text as it is."""
    best = [None if isinstance(column[0], str) else max(column) for column in list(zip(*rows, strict=True))[1:]]
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in header)]
    for name, *values in rows:
        texts = [value if isinstance(value, str) else f"{value:.4f}" for value in values]
        cells = [f"<b>{text}</b>" if value == top else text for text, value, top in zip(texts, values, best, strict=True)]
        lines.append(f"<td>{escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _scatter(data: Any, values: dict[str, dict[str, float]], measure: str) -> str:
    """One point for the queries of one place: the old model across, the new one upward."""
    old, new = values
    places: dict[tuple[float, float], list[str]] = {}
    for query in values[old]:
        places.setdefault((round(values[old][query], 3), round(values[new][query], 3)), []).append(query)
    points = []
    for (x, y), queries in places.items():
        title = escape("\n".join(data.queries[query][:80] for query in queries[:3]) + ("\n..." if len(queries) > 3 else ""))
        colour = "var(--good)" if y > x else "var(--bad)" if y < x else "grey"
        radius = 3 + min(9, (len(queries) - 1) ** 0.5)
        points.append(
            f'<circle cx="{40 + 300 * x:.1f}" cy="{310 - 300 * y:.1f}" r="{radius:.1f}" fill="{colour}" fill-opacity=".45">'
            f"<title>{x:.3f} to {y:.3f}, {len(queries)} queries:\n{title}</title></circle>"
        )
    won, lost = (sum(sign * values[new][q] > sign * values[old][q] for q in values[old]) for sign in (1, -1))
    return (
        f'<p><span class="good">{won} won</span>, <span class="bad">{lost} lost</span>, {len(values[old]) - won - lost} equal</p>'
        '<svg viewBox="0 -4 360 354" role="img"><title>per-query win/loss</title>'
        '<path d="M40 10V310H340M40 310L340 10" fill="none" stroke="grey" stroke-width=".7"/>'
        + "".join(points)
        + f'<text x="190" y="343" text-anchor="middle">{escape(old)}, {measure}</text>'
        f'<text transform="translate(12 160) rotate(-90)" text-anchor="middle">{escape(new)}, {measure}</text>'
        '<text x="36" y="324">0</text><text x="332" y="324">1</text><text x="26" y="16">1</text></svg>'
    )


def _extremes(data: Any, values: dict[str, dict[str, float]], tops: dict[str, dict[str, Hits]]) -> str:
    """The queries that gained and lost most, with the first passages by both models."""
    old, new = values
    gain = {query: values[new][query] - values[old][query] for query in values[old]}
    order = sorted(gain, key=lambda query: -gain[query])
    parts = []
    won, lost = [query for query in order if gain[query] > 0], [query for query in order[::-1] if gain[query] < 0]
    for title, chosen in (("Gained most", won), ("Lost most", lost)):
        parts.append(f"<h3>{title}</h3>")
        for query in chosen[:EXTREMES]:
            columns = ""
            for model, of_query in values.items():
                passages = _passages(data, query, tops[model].get(query, []))
                columns += f"<div><b>{escape(model)}</b> {of_query[query]:.3f}{passages}</div>"
            line = f"{gain[query]:+.3f} {escape(data.queries[query])}"
            parts.append(f'<details><summary>{line}</summary><div class="pair">{columns}</div></details>')
    return "".join(parts)


def _passages(data: Any, query: str, hits: Hits) -> str:
    found = []
    for passage, score in hits:
        gold = " gold" if data.qrels[query].get(passage, 0) > 0 else ""
        text = escape(data.corpus.by_id(passage)[:CHARACTERS])
        found.append(f'<div class="passage{gold}"><small>{score:.3f} {escape(passage)}</small><br>{text}</div>')
    return "".join(found) or "<p>no result</p>"
