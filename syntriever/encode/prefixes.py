"""What stands before a text: the prefixes of queries and passages that an encoder was trained with."""

import re
from typing import Any

from syntriever.run import terminal

Prefixes = tuple[str, str]  # of queries, of passages

E5 = ("query: ", "passage: ")

BGE = ("Represent this sentence for searching relevant passages: ", "")

QWEN3 = ("Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:", "")

GEMMA = ("task: search result | query: ", "title: none | text: ")

NONE = ("", "")

# Names under which the checkpoints of sentence-transformers keep them: `query`, `search_query`, `Retrieval-query`, ...
_TASKS = ("", "search_", "retrieval_", "web_search_", "s2p_")
_NAMES = [
    [task + side for task in _TASKS for side in sides] for sides in (("query", "question"), ("document", "passage", "corpus"))
]


def of_name(name: str) -> Prefixes | None:
    """E5 checkpoints do not carry their prefixes, so they are known by name."""
    return E5 if re.match(r"(multilingual-)?e5-(small|base|large)(?!.*instruct)", name) else None


def of_prompts(prompts: dict[str, str], default: str | None) -> tuple[Prefixes, list[str]]:
    """Prefixes among the named prompts of a checkpoint, and the names that say neither query nor passage. The
    default prompt stands before whatever has none of its own."""
    named = {re.sub(r"\W", "_", name.lower()): name for name, text in prompts.items() if text}
    other = [name for key, name in named.items() if key not in _NAMES[0] + _NAMES[1]]
    fallback = prompts[default] if default in other else ""
    query, passage = (next((prompts[named[key]] for key in keys if key in named), fallback) for keys in _NAMES)
    return (query, passage), [name for name in other if name != default]


def choose(model: Any, name: str, known: Prefixes | None, given: tuple[str | None, str | None]) -> dict[str, str]:
    """What is put before a "query" and a "document": what is `given` on the command line, else what the checkpoint
    says, else what is `known` of its name."""
    own, other = of_prompts(model.prompts, model.default_prompt_name)
    usual = own if any(own) else known or NONE
    for option, wanted, was in zip(("--query-prefix", "--passage-prefix"), given, usual, strict=True):
        if wanted not in (None, was):
            terminal.say(f"note:  {option} {wanted!r} for {name} instead of {was!r}")
    if other and "" in usual and None in given:
        terminal.say(
            f"note:  {name}: its prompts {', '.join(other)} are not used; --query-prefix and --passage-prefix set what is put "
            f"before a query (now {usual[0]!r}) and a passage (now {usual[1]!r})"
        )
    query, passage = (was if wanted is None else wanted for wanted, was in zip(given, usual, strict=True))
    return {"query": query, "document": passage}
