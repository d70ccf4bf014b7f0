"""Teachers that ask nobody: recorded answers that ship with a dataset, or the replies of a ledger."""

from collections.abc import Callable
from pathlib import Path

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replies import Reply


class ReplayTeacher:
    """Recorded answers that ship with a dataset, or lie in its folder (`recorded/`), looked up by the query's text.

    `synthesis.jsonl` holds cot, positive, negative and verdict; `preferences.jsonl` a ranking with ties, from which pairwise
    verdicts and grades follow, and in `relevant` which of its passages are relevant (without it, those of the first group).
    Either may be missing. What was not recorded has the reason `not_recorded`.
    """

    model, live, concurrency = "replay", False, 64

    def __init__(self, ds: str) -> None:
        folder = paths.recorded(ds)
        if not folder.is_dir():
            raise BadInput(
                f"--llm replay: there are no recorded answers for {ds}. Name a ledger (--ledger FILE), set OPENAI_API_KEY, "
                "or try --llm smollm2"
            )
        synthesis, preferences = paths.recordings(folder)
        self._rows: dict[str, jsonl.Row] = {}
        self._ranks: dict[str, dict[str, int]] = {}
        self._relevant: dict[str, set[str]] = {}
        if synthesis.is_file():
            self._rows = {row["query"]: row for row in jsonl.read(synthesis, {"query": str})}
        fields = {"query": str, "ranking": list}
        for number, _, row in jsonl.read_with_offsets(preferences, fields) if preferences.is_file() else ():
            ranking = row["ranking"]
            relevant = row["relevant"] if "relevant" in row else next(iter(ranking), [])
            if not all(isinstance(group, list) and all(isinstance(p, str) for p in group) for group in [*ranking, relevant]):
                what = "'ranking' must be a list of lists of passage ids, best first, and 'relevant', where there is one, a list"
                raise BadInput(f"{paths.shown(preferences)}:{number}: {what}")
            self._ranks[row["query"]] = {passage: rank for rank, tied in enumerate(ranking) for passage in tied}
            self._relevant[row["query"]] = set(relevant)

    def by_text(self, first_id: Callable[[str], str]) -> None:
        """Know each passage by the id of the first with its text; of its ranks the best counts."""
        for query, ranks in self._ranks.items():
            worst_first = sorted(ranks.items(), key=lambda item: -item[1])
            self._ranks[query] = {first_id(passage): rank for passage, rank in worst_first}
            self._relevant[query] = set(map(first_id, self._relevant[query]))

    def grades(self, query: str, passages: list[str]) -> dict[str, float]:
        """Grades of those passages that were ranked, in the order given: 2 (judged relevant) of the relevant ones; of the other
        groups 1 for the best, 0 for the last, 0.5 between; 0.5 for one alone, which is neither."""
        ranks, relevant = self._ranks.get(query, {}), self._relevant.get(query, set())
        others = sorted({rank for passage, rank in ranks.items() if passage not in relevant})
        by_rank = dict.fromkeys(others, 0.5)
        if len(others) > 1:
            by_rank |= {others[0]: 1.0, others[-1]: 0.0}
        return {p: 2.0 if p in relevant else by_rank[ranks[p]] for p in passages if p in ranks or p in relevant}

    async def answer(self, request: Request) -> Reply:
        query = request.item[0]
        if request.step == "compare":
            first, second = (self._ranks.get(query, {}).get(passage) for passage in request.item[1:])
            if first is None or second is None:
                return Reply(reason="not_recorded")
            return Reply("tie" if first == second else "1" if first < second else "2", finish_reason="stop")
        row = self._rows.get(query)
        if row is None or request.step not in ("cot", "positive", "negative", "verify"):
            return Reply(reason="not_recorded")
        text = ("yes" if row["verified"] else "no") if request.step == "verify" else row[request.step]
        return Reply(text, finish_reason="stop")

    async def close(self) -> None:
        pass


class LedgerTeacher:
    """The replies of a ledger (`--llm replay --ledger FILE`). What it lacks is `not_recorded`."""

    live, concurrency = False, 64

    def __init__(self, path: Path, model: str) -> None:
        if not path.is_file():
            raise BadInput(f"--ledger {path}: no such file")
        self._ledger = Ledger(path, read_only=True)
        models = self._ledger.models
        if not model and len(models) > 1:
            raise BadInput(f"--ledger {path} holds replies of {', '.join(models)}: name one, as in --llm replay:{models[0]}")
        if model and model not in models:
            raise BadInput(f"--ledger {path} holds no reply of {model}, only of {', '.join(models) or 'none'}")
        self.model = model or (models[0] if models else "replay")

    async def answer(self, request: Request) -> Reply:
        return self._ledger.get(request.key(self.model), request.max_tokens) or Reply(reason="not_recorded")

    async def close(self) -> None:
        self._ledger.close()
