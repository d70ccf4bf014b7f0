"""Options that several scripts share, and their checks."""

import argparse
import importlib.util

from syntriever.errors import BadInput
from syntriever.run import cli

LORA_LR = 2e-4


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """Options of the stages that embed a corpus."""
    group = parser.add_argument_group("encoding")
    group.add_argument("--max-length", type=int, help="tokens kept of each text (default: the model's own)")
    group.add_argument(
        "--backend",
        choices=("auto", "torch", "compile", "onnx", "onnx-int8"),
        default="auto",
        help="what runs the encoder: auto is onnx on a CPU where the encoder can be exported, else torch; onnx-int8 (quantised, "
        "other vectors) is faster on a CPU, compile on a GPU (default: %(default)s)",
    )
    group.add_argument(
        "--batch-tokens", type=int, help="tokens per forward pass, padding counted (default: what suits the device)"
    )
    group.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the vectors on disk (default: %(default)s)"
    )
    _add_common_options(group)


def add_training_options(parser: argparse.ArgumentParser, *, epochs: float, batch_size: int, lr: str) -> None:
    """Options of both training stages. `lr`: what the default of `--lr` is, without `--lora`."""
    group = parser.add_argument_group("training")
    cli.number(group, "--epochs", float, epochs, "passes over the rows")
    cli.number(group, "--batch-size", int, batch_size, "rows per step, of all processes together")
    group.add_argument("--lr", type=float, help=f"peak learning rate of AdamW (default: {lr}; with --lora {LORA_LR:g})")
    cli.number(group, "--warmup", float, 0.1, "share of the steps with rising learning rate")
    cli.number(group, "--temperature", float, 0.05, "tau of the scores cos/tau")
    group.add_argument("--max-length", type=int, help="tokens kept of each text in training (default: the model's own)")
    what = "Matryoshka: the mean of the loss over these lengths of the vectors, e.g. 768,256,64 (default: all entries alone)"
    group.add_argument("--dims", type=cli.numbers, metavar="N,N", help=what)
    cli.number(group, "--dev-pool", int, 20_000, "passages drawn beside the judged ones for dev")
    cli.number(group, "--dev-queries", int, 1_000, "dev queries at most")
    group.add_argument(
        "--mini-batch-size",
        type=int,
        help="gradient caching: hold the activations of this many texts at a time, for large batches (default: of all)",
    )
    what = "train adapters of this rank beside the linear layers (LoRA), not the encoder; they want a higher --lr than it does"
    group.add_argument("--lora", type=int, metavar="RANK", help=what)
    what = "save the adapters, too, in the folder adapter/ of the checkpoint, which itself holds them merged"
    group.add_argument("--save-adapter", action="store_true", help=what)
    group.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    cli.number(group, "--save-minutes", float, 15, "minutes between checkpoints, beside epochs")
    group.add_argument("--compile", action="store_true", help="compile the encoder (pays on a GPU, for long runs)")
    what = "bfloat16 in the forward pass on a CPU, too, as on a GPU (pays on one with AMX)"
    group.add_argument("--bf16", action="store_true", help=what)
    cli.number(group, "--seed", int, 42, "seed of order and dropout")
    _add_common_options(group)


def add_judgement_options(parser: argparse.ArgumentParser, usual: str, default: str) -> None:
    """Where relevance comes from, in both training stages: the `usual` source or an LLM's grades."""
    group = parser.add_argument_group("judgements")
    group.add_argument(
        "--judgements",
        choices=(usual, "llm", "both"),
        help="llm: the grades of stage2/parse_comparison.py --graded; both: these, and gold passages with the best grade "
        f"(default: {default})",
    )
    what = "a grade counts as exp(grade / this) in the order that the LLM's grades teach"
    cli.number(group, "--grade-temperature", float, 0.5, what)
    cli.number(group, "--contrast-weight", float, 1.0, "weight of judged-relevant passages against all others, beside that order")
    cli.number(group, "--corpus-weight", float, 0.3, "weight of relevant passages against the corpus, beside the batch")
    cli.number(group, "--candidates", int, 200, "nearest passages of the corpus that each query of a batch adds to it")


def _add_common_options(group: argparse._ArgumentGroup) -> None:
    """Options of all stages that have an encoder."""
    for side, what in (("query", "query"), ("passage", "passage or written text")):
        group.add_argument(f"--{side}-prefix", metavar="TEXT", help=f"put before each {what} (default: the model's own)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--name", help="short name for file names, where the model is a folder or a Hub id")
    group.add_argument("--strict", action="store_true", help="refuse judgements of ids that the dataset lacks")
    group.add_argument("--force", action="store_true", help="go on where an input is stale")


def check_encoding_options(args: argparse.Namespace) -> None:
    cli.check_positive(args, "max_length", "batch_tokens")
    _check_device(args.device)


def check_training_options(args: argparse.Namespace) -> None:
    cli.check_positive(
        args, "epochs", "batch_size", "lr", "temperature", "max_length", "dev_pool", "dev_queries", "mini_batch_size"
    )
    cli.check_positive(args, "candidates", "grade_temperature", "lora")
    if args.lora and importlib.util.find_spec("peft") is None:
        raise BadInput("--lora needs the package peft: pip install -r requirements.txt")
    if args.save_adapter and not args.lora:
        raise BadInput("--save-adapter saves what --lora RANK trains: add --lora")
    if not 0 <= args.warmup < 1:
        raise BadInput(f"--warmup is a share between 0 and 1, not {args.warmup}")
    _check_device(args.device)


def _check_device(device: str | None) -> None:
    """`BadInput` where this machine has no such device, before anything is read."""
    if device in (None, "cpu"):
        return
    import torch

    there, found = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if found:
        there += [found.type, *(f"{found.type}:{number}" for number in range(torch.accelerator.device_count()))]
    if device not in there:
        raise BadInput(f"--device {device}: not one of those that torch finds on this machine: {', '.join(there)}")
