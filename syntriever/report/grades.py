"""What the grades of a judge are worth: how many of each, by rank and by place, agreement with gold judgements, and what
pairwise judging would have taken."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from syntriever.files.jsonl import Row
from syntriever.report.judge import share
from syntriever.report.pictures import picture


class Mean:
    """Mean of values as they come, with its 95% interval by the normal law."""

    def __init__(self) -> None:
        self.number, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.number, self._sum, self._squares = self.number + 1, self._sum + value, self._squares + value * value

    def results(self) -> dict[str, Any]:
        """{"mean", "of", "interval"}: null without values, and without two of them."""
        if not self.number:
            return {"mean": None, "of": 0, "interval": None}
        mean = self._sum / self.number
        spread = max(0.0, self._squares - self.number * mean**2) / (self.number - 1) if self.number > 1 else 0.0
        half = 1.96 * math.sqrt(spread / self.number)
        interval = [round(mean - half, 4), round(mean + half, 4)] if self.number > 1 else None
        return {"mean": round(mean, 4), "of": self.number, "interval": interval}


def report(
    rows: Iterable[Row],
    gold: Mapping[str, Mapping[str, int]],
    ranked: Callable[[str], Sequence[str]],
    in_pairs: Callable[[Row], tuple[int, float]],
    relevant: float,
) -> dict[str, Any]:
    """Report on rows of `..._judgements.jsonl` and of its failed file. Passages are the first with their text, in the
    rows, in `gold`, and in what `ranked` gives: those retrieved for a query, best first. `in_pairs` tells the requests and
    prompt tokens that a row's passages take in pairs. A grade of `relevant` or more is a relevant one.

    - grades: passages by grade, rounded down, so that those from `relevant` on are the relevant ones. by_rank: their mean grade
      at each rank of retrieval.
    - nothing: share of the queries without a relevant passage.
    - by_place: mean grade at each place in a request. first_half: mean grade of the first half of the places less that of the
      second, over the queries: 0 where position plays no role. Where both orders were asked, both count.
    - gold: over the passages of the queries with gold judgements, Cohen's kappa, precision and recall of the relevant ones.
    - asked, pairs: requests and tokens, of those rows that were asked for; of asking once more, only the second time counts.

    Memory does not grow with the number of rows.
    """
    outcomes: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    by_rank: list[Mean] = []
    by_place: list[Mean] = []
    halves = Mean()
    both = {(mine, theirs): 0 for mine in (False, True) for theirs in (False, True)}
    asked: Counter[str] = Counter(requests=0, prompt_tokens=0, completion_tokens=0)
    others: Counter[str] = Counter(carried=0, not_recorded=0)
    nothing, pairs, pair_tokens = 0, 0, 0.0

    def at(means: list[Mean], place: int) -> Mean:
        means.extend(Mean() for _ in range(place + 1 - len(means)))
        return means[place]

    for row in rows:
        outcomes[row.get("reason", "graded")] += 1
        if "reason" in row:
            continue
        grades = row["grades"]
        counts.update(map(int, grades.values()))
        nothing += all(grade < relevant for grade in grades.values())
        for rank, passage in enumerate(ranked(row["query_id"])):
            if passage in grades:
                at(by_rank, rank).add(grades[passage])
        orders = row.get("raw", ())
        for order in orders:
            for place, grade in enumerate(order):
                at(by_place, place).add(grade)
        if orders and (half := len(orders[0]) // 2):
            halves.add(sum(sum(order[:half]) - sum(order[-half:]) for order in orders) / half / len(orders))
        asked["requests"] += len(orders) or (len(row["shown"]) if "log_odds" in row else 0)
        asked.update({name: row.get(name, 0) for name in ("prompt_tokens", "completion_tokens")})
        others.update({name: row.get(name, 0) for name in others})
        more, tokens = in_pairs(row)
        pairs, pair_tokens = pairs + more, pair_tokens + tokens
        if row["query_id"] in gold:
            for passage, grade in grades.items():
                both[grade >= relevant, gold[row["query_id"]].get(passage, 0) >= 1] += 1
    return {
        "outcomes": dict(outcomes),
        "relevant_from": relevant,
        "grades": {str(grade): share(counts[grade], counts.total()) for grade in range(4)},
        "by_rank": [mean.results() for mean in by_rank],
        "nothing": share(nothing, outcomes["graded"]),
        "by_place": [mean.results() for mean in by_place],
        "first_half": halves.results(),
        "gold": _agreement(both),
        "asked": dict(asked),
        "pairs": {"requests": pairs, "prompt_tokens": round(pair_tokens)},
        **others,
    }


def _agreement(both: dict[tuple[bool, bool], int]) -> dict[str, Any] | None:
    """Cohen's kappa, precision and recall of the judge against gold; None where there is no gold passage among them."""
    total, hits = sum(both.values()), both[True, True]
    judged, relevant = hits + both[True, False], hits + both[False, True]
    if not relevant:
        return None
    observed = (hits + both[False, False]) / total
    chance = (judged * relevant + (total - judged) * (total - relevant)) / total**2
    kappa = round((observed - chance) / (1 - chance), 4) if chance < 1 else None
    return {"kappa": kappa, "precision": share(hits, judged), "recall": share(hits, relevant), "of": total}


def lines(found: dict[str, Any]) -> list[str]:
    """The report in words, one measure a line."""
    said = []
    if found["nothing"]["of"]:
        said.append("grades: " + ", ".join(f"{grade} {of['share']:.0%}" for grade, of in found["grades"].items() if of["of"]))
        said.append("mean grade by rank: " + " ".join(f"{of['mean']:.2f}" if of["of"] else "-" for of in found["by_rank"]))
        queries = f"{found['nothing']['share']:.1%} of {found['nothing']['of']:,} queries"
        said.append(f"nothing of grade {found['relevant_from']:g} or more: {queries}")
    half = found["first_half"]
    if half["interval"]:
        low, high = half["interval"]
        said.append(f"shown in the first half rather than the second: {half['mean']:+.3f} of a grade ({low:+.3f} to {high:+.3f})")
    if gold := found["gold"]:
        shares = (f"{name} {gold[name]['share']:.2f}" for name in ("precision", "recall") if gold[name]["of"])
        what = f"judged relevant against gold labels, {gold['of']:,} passages"
        said.append(f"{what}: kappa {gold['kappa']}, {', '.join(shares)}")
    asked, pairs = found["asked"], found["pairs"]
    if asked["requests"]:
        took = f"{asked['requests']:,} requests with {asked['prompt_tokens']:,} prompt tokens"
        said.append(f"{took}; in pairs the same takes {pairs['requests']:,} with about {pairs['prompt_tokens']:,}")
    if found["carried"]:
        said.append(f"{found['carried']:,} grades were there from earlier runs")
    if found["not_recorded"]:
        said.append(f"{found['not_recorded']:,} of the passages have no recorded grade; they are left out")
    return said


def draw(found: dict[str, Any], path: Path, title: str) -> None:
    """Picture of the report: how many passages have each grade, and the mean grade at each rank and each place."""
    with picture(path, title, 2, (11, 3.4)) as (left, right):
        left.bar(list(found["grades"]), [of["count"] for of in found["grades"].values()], color="tab:gray")
        left.bar_label(left.containers[0])
        left.margins(y=0.15)
        left.set(title="passages by grade", xlabel="grade")
        for name, label in (("by_rank", "rank of retrieval"), ("by_place", "place in the request")):
            means = [
                (place, of["mean"], of["interval"] or [of["mean"]] * 2) for place, of in enumerate(found[name], 1) if of["of"]
            ]
            if means:
                spread = [[mean - low for _, mean, (low, _) in means], [high - mean for _, mean, (_, high) in means]]
                right.errorbar([p for p, *_ in means], [m for _, m, _ in means], yerr=spread, marker="o", capsize=2, label=label)
        right.set(title="mean grade, with 95% intervals", ylim=(0, 3))
        if right.get_legend_handles_labels()[0]:
            right.legend()
