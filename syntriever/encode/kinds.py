"""What kind of model a checkpoint is, by its JSON files: an encoder of single texts, or refused with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput

# Signs in the names of modules and architectures -> why that is no encoder for here.
REFUSED = {
    ("SparseEncoder", "sparse_encoder", "Splade"): "a sparse encoder: it weighs words and has no dense vector of a text",
    ("CrossEncoder", "cross_encoder", "Classification", "QuestionAnswering", "MultipleChoice"): "a cross-encoder or another "
    "model with a classification head: it has no vector of a text",
}

CONVERT = (
    "is a pickle, which could run code. Where you trust it, convert it to safetensors, once: python -c "
    "\"from sentence_transformers import SentenceTransformer as S; S('{0}').save_pretrained('{0}-safe')\""
)


def content(path: str | Path | None, kind: type = dict) -> Any:
    """Of a JSON file; empty where there is none, or not one of this kind."""
    try:
        found = json.loads(Path(path).read_bytes()) if path else None
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, kind) else kind()


def check(name: str, find: Callable[[str], str | Path | None]) -> str:
    """Where the transformer of a checkpoint lies in it; `find` gives the path of a file of the checkpoint.

    Raises `BadInput` that says what to do where it is no encoder of single texts with a transformer.
    """
    modules = [module for module in content(find("modules.json"), list) if isinstance(module, dict)]
    types, place = [str(module.get("type")) for module in modules], str(modules[0].get("path", "")) if modules else ""
    config = content(find("config.json"))
    if content(find("adapter_config.json")):
        raise BadInput(
            f"{name} is a LoRA adapter: merge it into its base model first (peft: merge_and_unload(), then save_pretrained()) "
            "and name the merged folder, which has no adapter_config.json"
        )
    heads = types or config.get("architectures") or []  # the head of what lies below the modules is not used
    signs = " ".join([str(content(find("config_sentence_transformers.json")).get("model_type")), *map(str, heads)])
    for some, what in REFUSED.items():
        if any(sign in signs for sign in some):
            raise BadInput(f"{name} is {what}. Name a dense encoder, or the model that this one was trained from")
    first = "StaticEmbedding" if config.get("model_type") == "model2vec" else types[0].rpartition(".")[2] if types else ""
    if first and "Transformer" not in first:
        raise BadInput(f"{name} begins with {first}, which is no transformer; only encoders that are one can be trained here")
    return place


def late(find: Callable[[str], str | Path | None]) -> bool:
    """Whether it is a late-interaction encoder: ColBERT's, PyLate's or sentence-transformers' format."""
    kind = content(find("config_sentence_transformers.json")).get("model_type")
    return kind in ("ColBERT", "MultiVectorEncoder") or content(find("config.json")).get("architectures") == ["HF_ColBERT"]


def check_folder(model: str, folder: Path) -> None:
    """`BadInput` where a folder is no encoder of safetensors."""
    root = folder / check(model, lambda name: folder / name)
    pickles = [*root.glob("pytorch_model*.bin"), *folder.glob("*_*/pytorch_model.bin")]  # the latter of a Dense layer, say
    for pickled in sorted(pickles):
        if not list(pickled.parent.glob("*.safetensors")):
            raise BadInput(f"{pickled} {CONVERT.format(model)}")
    if not (root / "config.json").is_file() or not list(root.glob("*.safetensors")):
        raise BadInput(f"{model} is not a checkpoint: it needs config.json and model.safetensors")
