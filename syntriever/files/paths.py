"""Every file the stages pass to each other, and nowhere else.

Places are fixed relative to the repository, never to the working directory, so that each script
runs from anywhere. `SYNTRIEVER_HOME` moves all data (not the code) to another disk.
"""

import os
import re
from pathlib import Path

from syntriever.errors import BadInput

CODE = Path(__file__).resolve().parents[2]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def home() -> Path:
    """Folder that holds `datasets/`, `stage2/`, `output/` and `results/`."""
    return Path(os.environ.get("SYNTRIEVER_HOME") or CODE).expanduser().resolve()


def check_name(name: str, what: str = "dataset") -> str:
    """Return `name` if it is safe as a file name; a name never leads out of its folder."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"{what} name {name!r}: use letters, digits, '.', '_' and '-' only (1 to 100)")
    return name


def dataset(ds: str) -> Path:
    return home() / "datasets" / check_name(ds)


def corpus(ds: str) -> Path:
    return dataset(ds) / "corpus.jsonl"


def queries(ds: str) -> Path:
    return dataset(ds) / "queries.jsonl"


def qrels(ds: str, split: str) -> Path:
    return dataset(ds) / "qrels" / f"{check_name(split, 'split')}.tsv"


def recorded(ds: str) -> Path:
    """Answers of a teacher (`--llm replay`): those that ship with the code, or that lie with a dataset of the user."""
    shipped = CODE / "datasets" / "recorded" / check_name(ds)
    return shipped if shipped.is_dir() else dataset(ds) / "recorded"


def recordings(folder: Path) -> tuple[Path, Path]:
    """The recorded texts and the recorded rankings."""
    return folder / "synthesis.jsonl", folder / "preferences.jsonl"


def synthetic(ds: str) -> Path:
    return home() / "datasets" / f"{check_name(ds)}_synthetic.jsonl"


def generated(ds: str) -> Path:
    """Queries that an LLM wrote from passages."""
    return home() / "datasets" / f"{check_name(ds)}_generated.jsonl"


def judged(ds: str) -> Path:
    """Grades of an LLM for the pool of `evaluate.py --split judged`: what `qrels/judged.tsv` is made from."""
    return home() / "datasets" / f"{check_name(ds)}_judged.jsonl"


def judged_ledger(ds: str) -> Path:
    """Every reply that the judging of that pool received."""
    return home() / "datasets" / f"{check_name(ds)}_judged.ledger.jsonl"


def model_output(name: str) -> Path:
    return home() / "output" / check_name(name, "model")


def embeddings(model_folder: str, ds: str) -> Path:
    """Corpus embeddings of `ds` by the model that `output/<model_folder>/` holds or stands for."""
    return model_output(model_folder) / "embeddings" / check_name(ds)


def top(model: str, ds: str, k: int = 100) -> Path:
    return home() / "stage2" / f"{check_name(model, 'model')}_{check_name(ds)}_top{k}.jsonl"


def preferences(model: str, ds: str) -> Path:
    return home() / "stage2" / f"{check_name(model, 'model')}_{check_name(ds)}_preferences.jsonl"


def judgements(model: str, ds: str) -> Path:
    """Grades of an LLM for the top passages of a model."""
    return home() / "stage2" / f"{check_name(model, 'model')}_{check_name(ds)}_judgements.jsonl"


def result(model: str, ds: str, split: str, suffix: str) -> Path:
    return home() / "results" / f"{check_name(model, 'model')}_{check_name(ds)}_{split}{suffix}"


def failed(path: Path) -> Path:
    """Rows that an LLM stage could not complete, beside its output."""
    return path.with_name(path.stem + ".failed.jsonl")


def synthesis_ledger(ds: str) -> Path:
    """Every reply that synthesis received."""
    return home() / "datasets" / f"{check_name(ds)}_synthetic.ledger.jsonl"


def generation_ledger(ds: str) -> Path:
    """Every reply that the writing of queries received."""
    return home() / "datasets" / f"{check_name(ds)}_generated.ledger.jsonl"


def comparison_ledger(ds: str) -> Path:
    """Every reply that comparison received: one for all models, whose top passages overlap."""
    return home() / "stage2" / f"{check_name(ds)}_preferences.ledger.jsonl"


def batches(path: Path) -> Path:
    """The batches that an LLM stage has submitted and not collected, beside its output."""
    return path.with_name(path.stem + ".batches.json")


def cached(name: str) -> Path:
    """A file that is downloaded once for all projects of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syntriever" / name


def report_html() -> Path:
    """One page about the last evaluation."""
    return home() / "results" / "report.html"


def report(path: Path, suffix: str) -> Path:
    """What the judge's verdicts are worth, beside the preferences."""
    return path.with_name(path.stem + f".report{suffix}")


def run_json(path: Path) -> Path:
    """Record of how `path` was made: beside a file, inside a folder (also for the weights in it)."""
    if path.suffix == ".safetensors":
        path = path.parent
    return path / "run.json" if path.is_dir() else path.with_name(path.name + ".run.json")


def shown(path: Path) -> str:
    """`path` as the user would type it: relative to the data folder where it lies inside."""
    return str(path.relative_to(home())) if path.is_relative_to(home()) else str(path)
