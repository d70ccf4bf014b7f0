"""What both training stages share: batches, the loop on sentence-transformers' trainer, the log."""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PrinterCallback

from syntriever import jsonl, models, paths, search, stage
from syntriever.errors import Failed
from syntriever.journal import DevScore, Journal, card, draw

# Texts that share one forward pass: batches are cut by length so that short ones are not padded.
CHUNK = 16

Sample = tuple[list[tuple[str, str] | None], list[int]]
LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Collator:
    """Turns row numbers into tokens. Each distinct text of a batch is encoded once; absent ones
    cost nothing.

    `sample(row)` gives the row's texts as (prefix, text) or None, one per column, and further
    integers that the loss needs. The batch carries the texts in chunks of similar length, and
    `label`: (B, columns + further), where a column is the text's place in the encoded batch or -1.
    """

    def __init__(self, model: SentenceTransformer, sample: Callable[[int], Sample], max_length: int) -> None:
        self.tokenizer, self.sample, self.max_length = model.tokenizer, sample, max_length
        # The trainer looks for these two.
        self.valid_label_columns = ["label"]
        self.last_rows: list[int] = []

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Tensor]:
        self.last_rows = [feature["row"] for feature in features]
        samples = [self.sample(row) for row in self.last_rows]
        unique = list(dict.fromkeys(text for texts, _ in samples for text in texts if text is not None))
        tokens = self.tokenizer([prefix + text for prefix, text in unique], truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        order = sorted(range(len(unique)), key=lambda i: len(tokens[i]))
        place: dict[tuple[str, str] | None, int] = {unique[i]: at for at, i in enumerate(order)}
        place[None] = -1
        batch: dict[str, Tensor] = {}
        for number, start in enumerate(range(0, len(order), CHUNK)):
            chunk = [tokens[i] for i in order[start : start + CHUNK]]
            for key, value in self.tokenizer.pad({"input_ids": chunk}, return_tensors="pt").items():
                batch[f"chunk{number}_{key}"] = value
        batch["label"] = torch.tensor([[place[text] for text in texts] + more for texts, more in samples])
        return batch


class UniqueQueryBatches(DefaultBatchSampler):
    """Batches in which no query occurs twice, all of them full to within one row.

    Rows are dealt like cards, query after query in random order, onto as many batches as are
    needed: rows of one query are neighbours and so land in different batches.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *, query_ids: Sequence[str], seed: int = 0, **_: Any
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, seed=seed)
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, query_id in enumerate(query_ids):
            self.rows[query_id].append(row)
        self.batches = max(-(-len(query_ids) // batch_size), max(map(len, self.rows.values())))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        groups = [rng.sample(rows, len(rows)) for rows in self.rows.values()]
        rng.shuffle(groups)
        dealt = [row for rows in groups for row in rows]
        order = rng.sample(range(self.batches), self.batches)
        yield from (dealt[batch :: self.batches] for batch in order)


class EmbeddingLoss(nn.Module):
    """Encodes a batch of `Collator` and hands (texts, D) embeddings and labels to a pure function.

    Keeps the parts of the loss until the log fetches them. Stops at the first loss that is not
    finite, before the optimiser can spoil the weights.
    """

    def __init__(self, model: SentenceTransformer, function: LossFunction) -> None:
        super().__init__()
        self.model, self.function = model, function
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = torch.cat([self.model(chunk)["sentence_embedding"] for chunk in features])
        loss, parts = self.function(embeddings.float(), labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(str(loss.item()))
        for name, value in parts.items():
            self.parts[name].append(value.detach())
        return loss

    def take_parts(self) -> dict[str, float]:
        """Mean of each part since the last call."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.parts.items()}
        self.parts.clear()
        return means


@contextmanager
def reference(output: Path) -> Iterator[Path]:
    """Folder beside `output` for the reference embeddings of a run; removed at its end."""
    folder = output.with_name(f".{output.name}.reference")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def embed(model: Any, texts: Iterable[str], kind: str, max_length: int | None, path: Path) -> Tensor:
    """(N, D) unit embeddings at the length used in training, kept on disk and mapped into memory."""
    count, dim = 0, model.get_embedding_dimension()
    with models.at_length(model, max_length), path.open("wb") as file, tqdm(unit="text", desc=f"reference {kind}") as bar:
        for window in batched(texts, search.WINDOW):
            file.write(search.encode(model, window, kind).tobytes())
            count += len(window)
            bar.update(len(window))
    return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=(count, dim)))


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window


class Trainer(SentenceTransformerTrainer):
    """The stock trainer; the model card is ours (`card`)."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def train(
    model: Any,
    function: LossFunction,
    sample: Callable[[int], Sample],
    query_ids: Sequence[str],
    dev: DevScore | None,
    args: argparse.Namespace,
    output: Path,
    record: stage.Record,
    title: str,
) -> None:
    """Train, keep the best epoch on dev, and put the finished checkpoint at `output`.

    The old checkpoint stays until the new one is complete; then they are swapped.
    """
    work = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    loss = EmbeddingLoss(model, function)
    collator: Any = Collator(model, sample, args.max_length or model.max_seq_length)
    journal = Journal(loss, work / "log.jsonl", dev)

    def batches(dataset: Dataset, batch_size: int, drop_last: bool, **more: Any) -> UniqueQueryBatches:
        return UniqueQueryBatches(dataset, batch_size, drop_last, query_ids=query_ids, **more)

    cuda = model.device.type == "cuda"
    trainer = Trainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(work / "trainer"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_steps=args.warmup,
            batch_sampler=batches,
            seed=args.seed,
            use_cpu=model.device.type == "cpu",
            bf16=cuda and torch.cuda.is_bf16_supported(),
            logging_steps=max(1, min(10, len(query_ids) // args.batch_size // 4)),
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"row": range(len(query_ids))}),
        loss=loss,
        data_collator=collator,
        callbacks=[journal],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except FloatingPointError as error:
        step = trainer.state.global_step + 1
        bad = output.with_name(f"{output.name}.bad-batch.json")
        jsonl.write_json(bad, {"step": step, "query_ids": [query_ids[row] for row in collator.last_rows]})
        message = f"the loss is {error} at step {step}; its queries are in {paths.shown(bad)}. Lower --lr"
        raise Failed(message) from None
    if journal.best_weights is not None:
        model.load_state_dict(journal.best_weights)
        stage.say(f"best   epoch {journal.best_epoch:g} with dev nDCG@10 {journal.best:.4f}")
    draw(journal.rows, work / "loss.png", title)
    models.save(model, work, card(title, args, journal))
    shutil.rmtree(work / "trainer", ignore_errors=True)
    record.write(
        work, steps=trainer.state.global_step, best_epoch=journal.best_epoch, dev_ndcg_at_10=journal.best if dev else None
    )
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.is_dir():
        output.rename(old)
    work.rename(output)
    shutil.rmtree(old, ignore_errors=True)
    stage.say(f"wrote  {paths.shown(output)}/: checkpoint, run.json, log.jsonl, loss.png")
