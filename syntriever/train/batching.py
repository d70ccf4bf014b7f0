"""Which rows share a batch, and its texts as tokens in chunks of similar length."""

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syntriever.encode import models

# One row: its texts as ("query" or "document", text), None where absent, and further integers for the loss.
Row = tuple[list[tuple[str, str] | None], list[int]]

# Padded tokens that share one forward pass: enough to fill the device, few enough that a text is not
# padded to the longest of the batch.
CPU_TOKENS, GPU_TOKENS = 1_024, 8_192


def deal(query_ids: Sequence[str], batch_size: int, seed: int, epoch: int, together: int = 1) -> list[list[int]]:
    """Batches of about `batch_size` row numbers, in an order drawn by seed and epoch.

    Up to `together` rows of one query stay in one batch; its others land in different batches. So each
    batch has the same number of rows to within `together`.
    """
    rng = random.Random(f"{seed} {epoch}")
    rows: dict[str, list[int]] = defaultdict(list)
    for row, query_id in enumerate(query_ids):
        rows[query_id].append(row)
    hands = []
    for of_query in rows.values():
        shuffled = rng.sample(of_query, len(of_query))
        hands.append([shuffled[start : start + together] for start in range(0, len(shuffled), together)])
    rng.shuffle(hands)
    count = max(-(-len(query_ids) // batch_size), max(map(len, hands)))
    batches: list[list[int]] = [[] for _ in range(min(count, sum(map(len, hands))))]
    emptiest = [(0, number) for number in range(len(batches))]
    for of_one in hands:
        for hand, (_, number) in [(hand, heapq.heappop(emptiest)) for hand in of_one]:
            batches[number] += hand
            heapq.heappush(emptiest, (len(batches[number]), number))
    rng.shuffle(batches)
    return batches


@dataclass
class Batch:
    """Tokens of the distinct texts of a batch, in chunks of similar length, and (rows, columns +
    further) `labels`, where a column is the text's place among the embeddings or -1."""

    rows: list[int]
    chunks: list[tuple[str, dict[str, Tensor]]]  # what its texts are ("query" or "document"), tokens
    labels: Tensor

    @property
    def sizes(self) -> list[int]:
        return [len(tokens["input_ids"]) for _, tokens in self.chunks]


class Collator:
    """Turns row numbers into a `Batch`. Each distinct text of a batch is encoded once; absent ones cost
    nothing. A chunk has at most `max_texts` texts and, unless it is a single one, `max_tokens` tokens."""

    def __init__(self, model: Any, sample: Callable[[int], Row], max_texts: int | None, max_tokens: int = CPU_TOKENS) -> None:
        self.model, self.sample, self.max_texts, self.max_tokens = model, sample, max_texts, max_tokens

    def __call__(self, numbers: list[int]) -> Batch:
        rows = [self.sample(number) for number in numbers]
        unique = list(dict.fromkeys(text for texts, _ in rows for text in texts if text is not None))
        tokens = models.tokenize(self.model, unique)
        # A late-interaction encoder treats queries and documents in different ways: no chunk holds both.
        groups = ("query", "document") if models.is_late(self.model) else (None,)
        order, chunks = [], []
        for group in groups:
            # The longest first, so that what is too much for the memory shows at once.
            left = sorted((i for i, (kind, _) in enumerate(unique) if group in (None, kind)), key=lambda i: -len(tokens[i]))
            while left:
                size = min(self.max_texts or len(left), max(1, self.max_tokens // len(tokens[left[0]])))
                now, left = left[:size], left[size:]
                padded = models.pad(self.model, [unique[i] for i in now], [tokens[i] for i in now])
                chunks.append((group or "", padded))
                order += now
        place: dict[tuple[str, str] | None, int] = {unique[i]: at for at, i in enumerate(order)}
        place[None] = -1
        return Batch(numbers, chunks, torch.tensor([[place[text] for text in texts] + more for texts, more in rows]))
