"""The checkpoint outside: scores in its model card, upload to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from syntriever import jsonl, paths, stage
from syntriever.errors import BadInput, Failed

HEADING = "\n## Scores\n"
NOT_UPLOADED = ["embeddings/*", "tensorboard/*", ".*"]


def add_scores(folder: Path, ds: str, split: str, means: dict[str, float]) -> None:
    """Put the scores of one dataset into the model card: as `model-index`, which the Hub shows, and as
    a table. Those of other datasets stay."""
    from huggingface_hub import EvalResult, ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return
    card = ModelCard(path.read_text("utf-8"), ignore_metadata_errors=True)
    about: Any = card.data
    here: dict[str, Any] = {"task_type": "information-retrieval", "dataset_type": ds, "dataset_name": ds, "dataset_split": split}
    results = [one for one in about.eval_results or [] if (one.dataset_name, one.dataset_split) != (ds, split)]
    for name, value in means.items():
        results.append(EvalResult(metric_type=name.lower(), metric_name=name, metric_value=round(value, 4), **here))
    about.model_name, about.eval_results = folder.name, results
    cells = ((one.dataset_name, one.dataset_split, one.metric_name, f"{one.metric_value:.4f}") for one in results)
    rows = "".join(f"| {' | '.join(row)} |\n" for row in cells)
    body = card.text.split(HEADING)[0].rstrip("\n")
    text = f"---\n{card.data.to_yaml()}\n---\n{body}\n{HEADING}\n| dataset | split | measure | value |\n|---|---|---|---|\n{rows}"
    with jsonl.atomic(path) as file:
        file.write(text.encode())


def check(repository: str) -> None:
    """Raise `BadInput` now rather than after an hour: a name that is none, no token, no Hub."""

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise BadInput(f"--push-to-hub {repository}: expected OWNER/NAME")
    try:
        HfApi().whoami()
    except (OSError, ValueError, HTTPError) as error:
        raise BadInput(
            f"--push-to-hub: the Hub does not know you ({_first(error)}); run `hf auth login`, or set HF_TOKEN"
        ) from None


def push(folder: Path, repository: str) -> None:
    """Upload a checkpoint with its card; embeddings and logs of TensorBoard stay here. A new repository is private."""

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        made = api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=NOT_UPLOADED)
    except (OSError, ValueError, HTTPError) as error:
        raise Failed(
            f"cannot upload {paths.shown(folder)}/ to {repository}: {_first(error)}; the same command tries again"
        ) from error
    stage.say(f"pushed {paths.shown(folder)}/ to {made.commit_url}")


def _first(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
