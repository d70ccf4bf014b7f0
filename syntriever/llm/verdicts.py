"""What counts as an answer to a question with choices."""

import json
from dataclasses import replace

from syntriever.llm.ledger import Reply, Request


def checked(request: Request, reply: Reply) -> Reply:
    """`reply`, with the reason `unparsable` where it should be a verdict and is none. A judge that
    talks is cut off after a few tokens: unparsable too, rather than a truncated reply."""
    if request.choices and reply.reason in ("", "length", "empty"):
        return replace(reply, reason="" if parse_verdict(reply.text, request.choices) else "unparsable")
    return reply


def parse_verdict(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that `text` is, apart from case, quotes and a full stop, or that it names as
    {"verdict": choice}; None for anything else."""
    if text.lstrip().startswith("{"):
        try:
            fields = json.loads(text, object_pairs_hook=list)  # pairs, to see a name that stands there twice
        except (ValueError, RecursionError):
            return None
        if len(fields) != 1 or fields[0][0] != "verdict" or not isinstance(fields[0][1], str):
            return None
        text = fields[0][1]
    word = text.strip().strip("\"'*`.").lower()
    return word if word in choices else None
