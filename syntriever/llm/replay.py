"""Teachers that ask nobody: recorded answers that ship with a dataset, or the replies of a ledger."""

from pathlib import Path

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replies import Reply


class ReplayTeacher:
    """Recorded answers of `datasets/recorded/<dataset>/`, looked up by the query's text.

    `synthesis.jsonl` holds cot, positive, negative and verdict; `preferences.jsonl` a ranking with
    ties, from which pairwise verdicts follow. What was not recorded has the reason `not_recorded`.
    """

    model, live, concurrency = "replay", False, 64

    def __init__(self, ds: str) -> None:
        folder = paths.recorded(ds)
        if not folder.is_dir():
            raise BadInput(
                f"--llm replay: no recorded answers ship for {ds}. Name a ledger (--ledger FILE), set OPENAI_API_KEY, "
                "or try --llm smollm2"
            )
        self._rows = {row["query"]: row for row in jsonl.read(folder / "synthesis.jsonl", {"query": str})}
        self._ranks = {
            row["query"]: {passage: rank for rank, tied in enumerate(row["ranking"]) for passage in tied}
            for row in jsonl.read(folder / "preferences.jsonl", {"query": str, "ranking": list})
        }

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
