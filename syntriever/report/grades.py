"""What the grades of a judge are worth: how many of each, by rank and by place, and agreement with gold judgements."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from syntriever.files.jsonl import Row
from syntriever.report.judge import share
from syntriever.report.pictures import picture

RELEVANT = 2  # as in `syntriever/llm/grading.py`


def report(rows: Iterable[Row], gold: Mapping[str, Mapping[str, int]], pairs: int) -> dict[str, Any]:
    """Report on rows of `..._judgements.jsonl` and of its failed file. `gold` goes by the first passage of a text.

    - grades: how many passages have each, rounded. by_rank: mean grade of the passages at each rank of retrieval.
    - nothing: share of the queries without a passage of `RELEVANT` or more.
    - first_half: mean grade of the passages shown in the first half of a request, less that of the others, over the
      queries, with its 95% interval: 0 where position plays no role.
    - gold: passages with a gold judgement, or of queries with one: kappa, precision and recall of the judge's relevant ones.
    - pairwise: requests that pairwise judging of as many candidates takes, with `pairs` a query at most.
    """
    outcomes: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    ranks: list[list[float]] = []
    halves: list[float] = []
    both = {(mine, theirs): 0 for mine in (False, True) for theirs in (False, True)}
    nothing = requests = pairwise = carried = tokens = 0
    for row in rows:
        outcomes[row.get("reason", "graded")] += 1
        if "reason" in row:
            continue
        grades, shown = row["grades"], row["shown"]
        counts.update(round(grade) for grade in grades.values())
        nothing += all(grade < RELEVANT for grade in grades.values())
        for rank, grade in enumerate(grades.values()):
            if rank == len(ranks):
                ranks.append([])
            ranks[rank].append(grade)
        if len(shown) > 1:
            half = len(shown) // 2
            first, last = [grades[p] for p in shown[:half]], [grades[p] for p in shown[-half:]]
            halves.append(sum(first) / half - sum(last) / half)
        requests += len(shown) if "log_odds" in row else len(row.get("replies", ()))
        pairwise += min(pairs, len(shown) * (len(shown) - 1) // 2)
        carried += row.get("carried", 0)
        tokens += row.get("prompt_tokens", 0) + row.get("completion_tokens", 0)
        if row["query_id"] in gold:
            for passage, grade in grades.items():
                both[grade >= RELEVANT, gold[row["query_id"]].get(passage, 0) >= 1] += 1
    return {
        "outcomes": dict(outcomes),
        "grades": {str(grade): share(counts[grade], counts.total()) for grade in range(4)},
        "by_rank": [round(sum(of_rank) / len(of_rank), 4) for of_rank in ranks],
        "nothing": share(nothing, outcomes["graded"]),
        "first_half": _mean(halves),
        "gold": _agreement(both),
        "requests": requests,
        "tokens": tokens,
        "carried": carried,
        "pairwise_requests": pairwise,
    }


def _mean(values: list[float]) -> dict[str, Any]:
    """{"mean", "of", "interval"}: with its 95% interval by the normal law, null below two values."""
    if len(values) < 2:
        return {"mean": None, "of": len(values), "interval": None}
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return {"mean": round(mean, 4), "of": len(values), "interval": [round(mean - half, 4), round(mean + half, 4)]}


def _agreement(both: dict[tuple[bool, bool], int]) -> dict[str, Any] | None:
    """Cohen's kappa, precision and recall of the judge against gold; None without a gold judgement."""
    total, hits = sum(both.values()), both[True, True]
    judged, relevant = hits + both[True, False], hits + both[False, True]
    if not total or not relevant:
        return None
    observed = (hits + both[False, False]) / total
    chance = (judged * relevant + (total - judged) * (total - relevant)) / total**2
    kappa = round((observed - chance) / (1 - chance), 4) if chance < 1 else None
    return {"kappa": kappa, "precision": share(hits, judged), "recall": share(hits, relevant), "of": total}


def lines(found: dict[str, Any]) -> list[str]:
    """The report in words, one measure a line."""
    said = ["grades: " + ", ".join(f"{grade} {of['share']:.0%}" for grade, of in found["grades"].items() if of["of"])]
    said.append("mean grade by rank: " + " ".join(f"{mean:.2f}" for mean in found["by_rank"]))
    if found["nothing"]["of"]:
        said.append(f"nothing of grade {RELEVANT} or more: {found['nothing']['share']:.1%} of {found['nothing']['of']:,} queries")
    half = found["first_half"]
    if half["interval"]:
        low, high = half["interval"]
        said.append(f"shown in the first half rather than the second: {half['mean']:+.3f} of a grade ({low:+.3f} to {high:+.3f})")
    if gold := found["gold"]:
        shares = (f"{name} {gold[name]['share']:.2f}" for name in ("precision", "recall") if gold[name]["of"])
        said.append(f"against the gold labels of {gold['of']:,} passages: kappa {gold['kappa']}, {', '.join(shares)}")
    if found["requests"]:
        said.append(f"{found['requests']:,} requests; judging the same candidates in pairs takes {found['pairwise_requests']:,}")
    return said


def draw(found: dict[str, Any], path: Path, title: str) -> None:
    """Picture of the report: how many passages have each grade, and the mean grade at each rank."""
    with picture(path, title, 2, (11, 3.4)) as (left, right):
        left.bar(list(found["grades"]), [of["count"] for of in found["grades"].values()], color="tab:gray")
        left.bar_label(left.containers[0])
        left.set(title="passages by grade", xlabel="grade")
        right.plot(range(1, len(found["by_rank"]) + 1), found["by_rank"], marker="o")
        right.set(title="mean grade by rank of retrieval", xlabel="rank", ylim=(0, 3))
