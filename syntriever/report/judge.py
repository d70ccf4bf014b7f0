"""What the verdicts of a pairwise judge are worth: ties, flips, position bias, cycles, agreement with
the dataset's own judgements."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from syntriever.files import jsonl
from syntriever.files.jsonl import Row
from syntriever.report.pictures import picture

# Reasons that are a judgement all the same.
JUDGED = ("tie", "disagreement")


def share(part: int, whole: int) -> dict[str, Any]:
    """{"count", "of", "share", "interval"}: the share with its 95% Wilson interval, null without cases."""
    if not whole:
        return {"count": part, "of": whole, "share": None, "interval": None}
    z, p = 1.96, part / whole
    middle, half = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + z * z / (4 * whole * whole))
    low, high = (abs(middle + sign * half) / (1 + z * z / whole) for sign in (-1, 1))  # abs: not -0.0
    return {"count": part, "of": whole, "share": round(p, 4), "interval": [round(low, 4), round(high, 4)]}


def report(rows: Iterable[Row], gold: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Report on rows of `..._preferences.jsonl` and of its failed file.

    - outcomes: rows that are decided, and that have each reason.
    - tie: share of the judged pairs. flip: share of the pairs judged in both orders whose verdicts
      disagree. first_shown: share of the verdicts 1 or 2 that say 1; half where position plays no role.
    - cycle: share of the passage triples with all three pairs decided that go round (a > b > c > a).
    - gold: share of the decided pairs with exactly one relevant passage in which that one is preferred.

    Memory does not grow with the number of rows.
    """
    outcomes: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    both = flips = gold_wins = gold_pairs = 0
    edges = jsonl.scratch("edge (query TEXT, winner TEXT, loser TEXT, PRIMARY KEY (query, winner, loser))")
    for row in rows:
        reason = row.get("reason", "decided")
        outcomes[reason] += 1
        if reason != "decided" and reason not in JUDGED:
            continue
        verdicts.update(row["verdicts"])
        if len(row["verdicts"]) == 2:
            both += 1
            flips += reason == "disagreement"
        if reason != "decided":
            continue
        winner, loser = row["preferred_id"], row["rejected_id"]
        edges.execute("INSERT OR IGNORE INTO edge VALUES (?, ?, ?)", (row["query_id"], winner, loser))
        relevant = [gold.get(row["query_id"], {}).get(passage, 0) >= 1 for passage in (winner, loser)]
        if relevant[0] != relevant[1]:
            gold_pairs += 1
            gold_wins += relevant[0]
    path = "FROM edge a JOIN edge b ON b.query = a.query AND b.winner = a.loser JOIN edge c ON c.query = a.query "
    in_order = edges.execute(f"SELECT count(*) {path} AND c.winner = a.winner AND c.loser = b.loser").fetchone()[0]
    around = f"{path} AND c.winner = b.loser AND c.loser = a.winner"  # finds each cycle three times
    cycles, queries = edges.execute(f"SELECT count(*), count(DISTINCT a.query) {around}").fetchone()
    total = edges.execute("SELECT count(DISTINCT query) FROM edge").fetchone()[0]
    edges.close()
    judged = outcomes["decided"] + sum(outcomes[reason] for reason in JUDGED)
    return {
        "outcomes": dict(outcomes),
        "verdicts": dict(verdicts),
        "tie": share(outcomes["tie"], judged),
        "flip": share(flips, both),
        "first_shown": share(verdicts["1"], verdicts["1"] + verdicts["2"]),
        "cycle": share(cycles // 3, cycles // 3 + in_order),
        "queries_with_a_cycle": share(queries, total),
        "gold": share(gold_wins, gold_pairs),
    }


LABELS = {
    "gold": "gold passage preferred",
    "first_shown": "passage shown first preferred",
    "tie": "ties",
    "flip": "verdict flips with the order",
    "cycle": "triples that go round",
}


def lines(found: dict[str, Any]) -> list[str]:
    """The report in words, one measure a line."""
    said = []
    for name, label in LABELS.items():
        measure = found[name]
        if measure["of"]:
            low, high = measure["interval"]
            said.append(f"{label}: {measure['share']:.1%} of {measure['of']:,} (95% interval {low:.1%} to {high:.1%})")
    return said


def draw(found: dict[str, Any], path: Path, title: str) -> None:
    """Picture of the report: what became of the pairs, and each share with its interval."""
    outcomes = sorted(found["outcomes"].items(), key=lambda item: item[1])
    measured = [(label, found[name]) for name, label in reversed(LABELS.items()) if found[name]["of"]]
    with picture(path, title, 2, (11, 3.4)) as (left, right):
        left.barh([name for name, _ in outcomes], [number for _, number in outcomes], color="tab:gray")
        left.bar_label(left.containers[0], padding=3)
        left.margins(x=0.15)
        left.set(title="pairs", xlabel="number")
        for height, (_, measure) in enumerate(measured):
            low, high = measure["interval"]
            right.plot([low, high], [height, height], color="tab:blue", linewidth=3, alpha=0.5, solid_capstyle="butt")
            right.plot(measure["share"], height, "o", color="tab:blue")
        right.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        right.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(measured) - 0.4), title="shares, with 95% intervals")
        right.set_yticks(range(len(measured)), [f"{label}\n(of {measure['of']:,})" for label, measure in measured])
