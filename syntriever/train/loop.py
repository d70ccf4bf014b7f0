"""The training loop of both stages: batches, encoding in length-sorted chunks, gradient caching,
several processes, checkpoints.

The loss is a pure function of the (texts, D) embeddings of a batch. So its gradient in the
embeddings is computed first, and then carried through the encoder chunk by chunk: the activations of
one chunk are all that need be held (gradient caching, Gao et al. 2021), and each process carries only
its share of the chunks. Neither changes the gradient.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from syntriever.encode import models
from syntriever.errors import Failed
from syntriever.files import jsonl, paths
from syntriever.run import lineage, processes, terminal
from syntriever.train import batching, checkpoint, lora, losses
from syntriever.train.journal import DevScore, Journal, card, draw

LossFunction = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]

GO_ON = "the same command with --resume goes on"


# ---- gradients


def backward(
    model: Any, batch: batching.Batch, function: LossFunction, seed: int, cached: bool = False, bf16: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add the gradients of the batch's loss to the model's parameters; the loss and its parts.

    Dropout is drawn by `seed` and the number of the chunk: the same in both passes of gradient
    caching (`cached`), on any number of processes, and after a resume. Raises `FloatingPointError`
    where the loss is not finite, before there is any gradient.
    """
    device = model.device
    own = range(processes.rank(), len(batch.chunks), processes.world())
    sizes = batch.sizes
    part: list[Any] = [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    shape = [sum(sizes), model.get_embedding_dimension()]
    if models.is_late(model):  # (texts, tokens, D), 0 where a text has no token
        widths = [tokens["input_ids"].shape[1] for _, tokens in batch.chunks]
        part = [(rows, slice(width)) for rows, width in zip(part, widths, strict=True)]
        shape.insert(1, max(widths))

    def encode(number: int) -> Tensor:
        torch.manual_seed((seed * 65_537 + number) % 2**63)
        kind, tokens = batch.chunks[number]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return models.forward(model, {name: value.to(device) for name, value in tokens.items()}, kind)

    with torch.set_grad_enabled(not cached):
        made = {number: encode(number) for number in own}
    embeddings = torch.zeros(shape, device=device)
    for number in own:
        embeddings[part[number]] = made[number].detach()
    processes.add_up(embeddings)
    embeddings.requires_grad_()
    loss, parts = function(embeddings, batch.labels.to(device))
    if not torch.isfinite(loss):
        raise FloatingPointError(str(loss.item()))
    loss.backward()
    assert embeddings.grad is not None
    if cached:
        made.clear()
    for number in own:
        (encode(number) if cached else made.pop(number)).backward(embeddings.grad[part[number]])
    if processes.world() > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                processes.add_up(parameter.grad)
    return loss.detach(), {name: value.detach() for name, value in parts.items()}


def spread(embeddings: Tensor, query: Tensor, passage: Tensor) -> dict[str, Tensor]:
    """Alignment (mean squared distance of query and passage) and uniformity (log of the mean of
    exp(-2 squared distance) over texts) of unit embeddings, after Wang and Isola (2020): lower is better.
    Nothing of token embeddings."""
    if embeddings.ndim > 2:
        return {}
    some = embeddings.detach()[:: max(1, len(embeddings) // 512)]
    apart = torch.pdist(some).square().mul(-2).exp().mean().log() if len(some) > 1 else some.sum() * 0
    return {"alignment": (query - passage).detach().square().sum(1).mean(), "uniformity": apart}


# ---- the loop


class Interrupt:
    """SIGTERM and Ctrl-C wait for the end of the step. A second Ctrl-C does not, and none does while
    the dev split is scored (`at_once`), which can be done again."""

    def __enter__(self) -> Interrupt:
        self.received, self.message = 0, ""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _: Any) -> None:
        if self.message or number == self.received == signal.SIGINT:
            self.stop(number, self.message)
        self.received = number

    @staticmethod
    def stop(number: int, message: str) -> NoReturn:
        raise KeyboardInterrupt(message) if number == signal.SIGINT else Failed(message)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        self.message = message
        if self.received:
            self.stop(self.received, message)
        yield
        self.message = ""

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, ...: up over the share `--warmup` of all steps, then down, linearly; never 0."""
    warmup = math.ceil(total * args.warmup)
    share = (step + 1) / (warmup + 1) if step < warmup else (total - step) / (total - warmup)
    return float(args.lr) * share


def train(
    model: Any,
    function: LossFunction,
    sample: Callable[[int], batching.Row],
    batches: Callable[[int], list[list[int]]],
    names: Sequence[str],
    dev: DevScore | None,
    args: argparse.Namespace,
    output: Path,
    record: lineage.Record,
    resume: Path | None,
    title: str,
) -> None:
    """Train, keep the best epoch on dev, and put the finished checkpoint at `output`.

    `batches(epoch)` are lists of row numbers, which `sample` turns into rows and `names` into query
    ids. `resume` is a checkpoint to go on from. The old output stays until the new one is complete; then they are swapped.
    """
    work, first = output.with_name(f".{output.name}.tmp"), processes.rank() == 0
    if first and not resume:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    cuda = model.device.type == "cuda"
    bf16 = args.bf16 or (cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    cached = args.mini_batch_size is not None
    if args.dims:
        if max(args.dims) < (width := model.get_embedding_dimension()):
            terminal.say(f"note:  --dims lacks {width}, the full length, by which the best epoch is chosen")
        function = losses.at_prefixes(function, args.dims)
    collate = batching.Collator(model, sample, args.mini_batch_size, batching.GPU_TOKENS if cuda else batching.CPU_TOKENS)
    adapters = lora.add(model, args.lora, args.seed) if args.lora else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0, fused=cuda)
    per_epoch = len(batches(0))
    total = math.ceil(args.epochs * per_epoch)
    state: dict[str, Any] = checkpoint.load(resume, model, optimizer) if resume else {"step": 0}
    journal = Journal(work, dev, total, max(1, min(10, per_epoch // 4)), state.get("journal"))
    if resume:
        terminal.say(f"resume from step {state['step']} of {total}")
    settings = checkpoint.settings_of(record)
    if args.compile:
        from torch._inductor import config

        config.fallback_random = True  # dropout as without --compile: the same in both passes of gradient caching
        encoder = model[0].auto_model
        # Not encoder.compile(): sentence-transformers calls `forward` itself and would pass it by.
        encoder.forward = torch.compile(encoder.forward, dynamic=True)

    def save(step: int) -> None:
        if first:
            checkpoint.save(work, step, model, optimizer, {"settings": settings, "journal": journal.state(step)})
            journal.saved()

    def score(step: int) -> None:
        with interrupt.at_once(f"stopped while dev was scored after step {step} of {total}; {GO_ON}"):
            journal.score(model, step, round(step / per_epoch, 4))
        model.train()

    def upcoming(step: int) -> Iterator[tuple[int, list[int]]]:
        """(number of the step, its row numbers) from `step` on."""
        for epoch in range(step // per_epoch, math.ceil(args.epochs)):
            for number, rows in enumerate(batches(epoch), epoch * per_epoch):
                if step <= number < total:
                    yield number, rows

    with models.at_length(model, args.max_length), Interrupt() as interrupt, ThreadPoolExecutor(1) as pool:
        # The start of a run, or an epoch whose score the interrupted run did not see.
        if state["step"] % per_epoch == 0 or state["step"] == total:
            score(state["step"])
        model.train()
        ahead = ((step, pool.submit(collate, rows)) for step, rows in upcoming(state["step"]))
        waiting = next(ahead, None)
        while waiting:
            step, batch = waiting[0], waiting[1].result()
            waiting = next(ahead, None)
            rate = learning_rate(step, total, args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            try:
                loss, parts = backward(model, batch, function, args.seed * 1_000_003 + step, cached, bf16)
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"{loss.item():.4g} and its gradient {norm.item()}")
            except FloatingPointError as error:
                bad = output.with_name(f"{output.name}.bad-batch.json")
                if first:
                    jsonl.write_json(bad, {"step": step + 1, "query_ids": [names[row] for row in batch.rows]})
                message = f"the loss is {error} at step {step + 1}; its queries are in {paths.shown(bad)}. Lower --lr"
                raise Failed(message) from None
            except torch.OutOfMemoryError:
                smaller = max(1, batch.sizes[0] // (2 if args.mini_batch_size else 1))
                message = f"out of memory at step {step + 1} ({sum(batch.sizes)} texts)"
                raise Failed(f"{message}. Pass --mini-batch-size {smaller}: the same loss in less memory") from None
            optimizer.step()
            done = step + 1
            journal.step(done, done / per_epoch, {"loss": loss, **parts}, rate, norm)
            received = processes.largest(interrupt.received, model.device)
            ends_epoch = done % per_epoch == 0 or done == total
            if received or ends_epoch or journal.minutes_since_save() >= args.save_minutes:
                save(done)
            if received:
                processes.wait()
                interrupt.stop(received, f"stopped at step {done} of {total}; {GO_ON}")
            if ends_epoch:
                if waiting:
                    waiting[1].exception()  # the tokenizer is not to be used by two threads at once
                score(done)
    if not first:
        return
    journal.choose(model, total, round(total / per_epoch, 4))
    journal.close()
    journal.restore_best(model)
    draw(journal.rows, work / "loss.png", title)
    if adapters:
        if args.save_adapter:
            known, _ = models.ALIASES.get(args.model, (args.model, None))
            adapters.peft_config["default"].base_model_name_or_path = known  # not where it lies here
            adapters.save_pretrained(str(work / "adapter"), save_embedding_layers=False)
        adapters.merge_and_unload()
    models.save(model, work, card(title, args, journal, models.is_late(model)))
    record.write(
        work, steps=total, best_epoch=journal.best_epoch, averaged=journal.averaged, dev_ndcg_at_10=journal.best if dev else None
    )
    checkpoint.swap(work, output)
    terminal.say(f"wrote  {paths.shown(output)}/: checkpoint, run.json, log.jsonl, loss.png")
