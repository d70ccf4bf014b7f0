"""What each source of a fusion contributes to its top 10."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from syntriever.report import metrics

DEPTH = 10

MEASURES = (f"nDCG@{DEPTH}", f"Recall@{DEPTH}")


class Contribution:
    """Counts query by query; memory does not grow with them."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = sources
        self.queries: Counter[str] = Counter()  # by source
        self._top, self._has, self._alone = Counter[str](), Counter[str](), Counter[str]()
        self._judged: dict[str, defaultdict[str, float]] = {}  # by kind of judgement: queries, and sums of the measures

    def add(self, ranks: Mapping[str, Mapping[str, int]], fused: Sequence[str], judged: Mapping[str, dict[str, int]]) -> None:
        """One query: the ranks by source, the fused ranking, and {kind of judgement: {passage: grade}}. Measured are only
        queries that all sources rank, so that the figures compare."""
        tops = {source: {passage for passage, rank in of_source.items() if rank <= DEPTH} for source, of_source in ranks.items()}
        having = Counter(passage for top in tops.values() for passage in top)
        best = fused[:DEPTH]
        for source, top in tops.items():
            found = [passage for passage in best if passage in top]
            self.queries[source] += 1
            self._top[source] += len(best)
            self._has[source] += len(found)
            self._alone[source] += sum(having[passage] == 1 for passage in found)
        for kind, grades in judged.items() if len(tops) == len(self.sources) else ():
            sums = self._judged.setdefault(kind, defaultdict(float))
            sums["queries"] += 1
            for source, of_source in {**ranks, "fusion": {passage: rank for rank, passage in enumerate(best)}}.items():
                run = {"q": {passage: -float(rank) for passage, rank in of_source.items()}}
                values = metrics.evaluate({"q": grades}, run, (DEPTH,))
                for measure in MEASURES:
                    sums[f"{source} {measure}"] += values[measure]["q"]

    def results(self) -> dict[str, Any]:
        """Shares and means, for the record."""
        shares = {
            source: {
                "queries": self.queries[source],
                "in_its_top": self._has[source] / max(self._top[source], 1),
                "in_no_other_top": self._alone[source] / max(self._top[source], 1),
            }
            for source in self.sources
        }
        measures = {
            kind: {"queries": int(sums["queries"])}
            | {
                f"{source} {measure}": sums[f"{source} {measure}"] / sums["queries"]
                for source in (*self.sources, "fusion")
                for measure in MEASURES
            }
            for kind, sums in self._judged.items()
        }
        return {"sources": shares, "measures": measures}

    def lines(self) -> Iterator[str]:
        """The same as tables to be read."""
        made = self.results()
        yield f"{'source':10}{'queries':>9}   share of the fused top {DEPTH} in its own top {DEPTH}, and in no other's"
        for source, of_source in made["sources"].items():
            yield f"{source:10}{of_source['queries']:9,}{of_source['in_its_top']:9.4f}{of_source['in_no_other_top']:9.4f}"
        for kind, means in made["measures"].items():
            yield f"{MEASURES[0]} and {MEASURES[1]} by the {kind} of {means['queries']:,} queries, those that all sources rank"
            for source in (*self.sources, "fusion"):
                yield f"{source:10}" + "".join(f"{means[f'{source} {measure}']:9.4f}" for measure in MEASURES)
