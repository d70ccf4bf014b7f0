"""What both training stages share: batches, the loop on sentence-transformers' trainer, the log."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import time
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
from transformers import PrinterCallback, TrainerCallback

from syntriever import beir, metrics, models, paths, search, stage
from syntriever.errors import Failed

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


class DevScore:
    """nDCG@10 on the dev split, over its judged passages and a random sample of the rest."""

    def __init__(self, ds: str, corpus: beir.Corpus, pool: int, max_queries: int, seed: int) -> None:
        queries, qrels = beir.load_split(ds, "dev")
        rng = random.Random(seed)
        chosen = rng.sample(sorted(queries), min(max_queries, len(queries)))
        self.queries, self.qrels = {q: queries[q] for q in chosen}, {q: qrels[q] for q in chosen}
        judged = {p for judgements in self.qrels.values() for p in map(corpus.position, judgements) if p is not None}
        positions = sorted(judged | set(rng.sample(range(len(corpus)), min(pool, len(corpus)))))
        self.ids, self.texts = [corpus.id(p) for p in positions], [corpus.text(p) for p in positions]

    def __call__(self, model: SentenceTransformer) -> float:
        passages = search.encode(model, self.texts, "document")
        scores = search.encode(model, list(self.queries.values()), "query") @ passages.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        run = {q: {self.ids[p]: float(scores[i, p]) for p in best[i]} for i, q in enumerate(self.queries)}
        return metrics.mean(metrics.evaluate(self.qrels, run, (10,))["nDCG@10"])


class Journal(TrainerCallback):
    """Progress bar, `log.jsonl`, and the best weights on dev."""

    def __init__(self, loss: EmbeddingLoss, log: Path, dev: DevScore | None) -> None:
        self.loss, self.dev, self.log = loss, dev, log
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_epoch = -1.0, 0.0
        self.best_weights: dict[str, Tensor] | None = None
        self.bar: Any = None
        self.started = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        row["seconds"] = round(time.monotonic() - self.started, 1)
        self.rows.append(row)
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def score(self, model: SentenceTransformer, epoch: float) -> None:
        if self.dev is None:
            return
        value = self.dev(model)
        self.add({"epoch": epoch, "dev_ndcg@10": value})
        tqdm.write(f"       epoch {epoch:g}: dev nDCG@10 {value:.4f}" + ("" if epoch else " (before training)"))
        if epoch and value > self.best:
            self.best, self.best_epoch = value, epoch
            self.best_weights = copy.deepcopy(model.state_dict())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.score(model, 0)
        self.bar = tqdm(total=state.max_steps, unit="step", desc="train")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            row = {"step": state.global_step, "epoch": round(state.epoch, 4), "loss": logs["loss"]}
            self.add({**row, "learning_rate": logs["learning_rate"], "grad_norm": logs["grad_norm"], **self.loss.take_parts()})
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.score(model, round(state.epoch, 4))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


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


def embed(model: Any, texts: Iterable[str], kind: str, max_length: int, path: Path) -> Tensor:
    """(N, D) unit embeddings at the length used in training, kept on disk and mapped into memory."""
    count, dim, longest = 0, model.get_embedding_dimension(), model.max_seq_length
    model.max_seq_length = max_length
    with path.open("wb") as file, tqdm(unit="text", desc=f"reference {kind}") as bar:
        for window in batched(texts, search.WINDOW):
            file.write(search.encode(model, window, kind).tobytes())
            count += len(window)
            bar.update(len(window))
    model.max_seq_length = longest
    return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=(count, dim)))


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while window := list(itertools.islice(iterator, size)):
        yield window


def dev_score(ds: str, corpus: beir.Corpus, args: argparse.Namespace) -> DevScore | None:
    """The dev set for choosing the best epoch; None where the dataset has none."""
    if paths.qrels(ds, "dev").is_file():
        return DevScore(ds, corpus, args.dev_pool, args.dev_queries, args.seed)
    stage.say(f"note:  {ds} has no dev split; the last epoch is kept")
    return None


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
        bad = work.with_name(f"{output.name}.bad-batch.json")
        bad.write_text(
            json.dumps({"step": trainer.state.global_step + 1, "query_ids": [query_ids[r] for r in collator.last_rows]})
        )
        raise Failed(
            f"the loss is {error} at step {trainer.state.global_step + 1}; its queries are in {paths.shown(bad)}. Lower --lr"
        ) from None
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


def card(title: str, args: argparse.Namespace, journal: Journal) -> str:
    """Model card: what it is, how it was made, how it is used."""
    dev = f"\nBest epoch {journal.best_epoch:g}, dev nDCG@10 {journal.best:.4f}.\n" if journal.best_epoch else ""
    options = "\n".join(f"| {name} | {value} |" for name, value in sorted(vars(args).items()))
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\ntags: [dense-retrieval, syntriever]\n---\n"
        f"# {title}\n{dev}\n```python\nfrom sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("path/to/this/folder")\n'
        'scores = model.similarity(model.encode_query(["..."]), model.encode_document(["..."]))\n```\n\n'
        f"| option | value |\n|---|---|\n{options}\n"
    )


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Picture of the log: the loss, its other parts, and dev nDCG@10."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if "loss" in row]
    dev = [row for row in rows if "dev_ndcg@10" in row]
    parts = [
        name for name in (steps[-1] if steps else {}) if name not in ("step", "epoch", "seconds", "learning_rate", "grad_norm")
    ]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    losses = [name for name in parts if not name.endswith(("accuracy", "share"))]
    for axis, names, label in (
        (axes[0], losses, "loss and its parts"),
        (axes[1], [p for p in parts if p not in losses], "share of the batch"),
    ):
        for name in names:
            axis.plot([row["epoch"] for row in steps], [row[name] for row in steps], label=name)
        axis.set(xlabel="epoch", title=label)
        if names:
            axis.legend(fontsize=8)
    axes[1].set_ylim(0, 1.02)
    axes[2].plot([row["epoch"] for row in dev], [row["dev_ndcg@10"] for row in dev], marker="o")
    axes[2].set(xlabel="epoch", title="dev nDCG@10" if dev else "no dev split")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
