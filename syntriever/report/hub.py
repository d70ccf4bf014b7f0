"""The checkpoint outside: scores in its model card, upload to the Hugging Face Hub."""

import re
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.run import terminal

BEGIN, END = "<!-- scores by evaluate.py -->", "<!-- end of scores -->"

NOT_UPLOADED = ["embeddings/*", "tensorboard/*", ".*"]


def add_scores(folder: Path, ds: str, split: str, how: str, means: dict[str, float]) -> None:
    """Put the scores of one dataset into the model card: as `model-index`, which the Hub shows, and as
    a table. Those of other datasets stay, and those of other settings (`how`: length, backend)."""
    from huggingface_hub import EvalResult, ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        card = ModelCard(path.read_text("utf-8"))
    except Exception as error:
        # Whatever its parser raises at what somebody wrote there: the scores lie in results/ all the same.
        terminal.say(
            f"note:  {paths.shown(path)} is not a model card that can be read ({_first(error)}); it stays without scores"
        )
        return
    about: Any = card.data
    place = ("dataset_name", "dataset_split", "dataset_config")
    here: dict[str, Any] = dict(zip(place, (ds, split, how), strict=True))
    results = [one for one in about.eval_results or [] if any(getattr(one, name) != here[name] for name in place)]
    for name, value in means.items():
        kind: dict[str, Any] = {"task_type": "information-retrieval", "dataset_type": ds, "metric_type": name.lower()}
        results.append(EvalResult(metric_value=round(value, 4), metric_name=name, **kind, **here))
    about.model_name, about.eval_results = about.model_name or folder.name, results
    rows = ""
    for one in results:
        cells = [*(getattr(one, name) or "" for name in place), one.metric_name or one.metric_type, one.metric_value]
        rows += f"| {' | '.join(map(str, cells))} |\n"
    table = f"{BEGIN}\n## Scores\n\n| dataset | split | settings | measure | value |\n|---|---|---|---|---|\n{rows}{END}"
    before, _, rest = card.text.partition(BEGIN)
    after = rest.partition(END)[2].strip("\n")
    text = f"---\n{card.data.to_yaml()}\n---\n{before.rstrip()}\n\n{table}\n" + (f"\n{after}\n" if after else "")
    with jsonl.atomic(path) as file:
        file.write(text.encode())


def create(repository: str) -> None:
    """Make the repository, private, where there is none. Raises `BadInput` now rather than after an hour:
    a name that is none, no Hub, no token or one that may not write there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise BadInput(f"--push-to-hub {repository}: expected OWNER/NAME")
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().auth_check(repository, write=True)  # the former is content where the repository exists
    except (OSError, ValueError, HTTPError) as error:
        raise BadInput(
            f"--push-to-hub {repository}: {_first(error)}; run `hf auth login`, or set HF_TOKEN to one that may write there"
        ) from None


def push(folder: Path, repository: str) -> None:
    """Upload a checkpoint with its card; embeddings and logs of TensorBoard stay here."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        made = HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=NOT_UPLOADED)
    except (OSError, ValueError, HTTPError) as error:
        raise Failed(
            f"cannot upload {paths.shown(folder)}/ to {repository}: {_first(error)}; the same command tries again"
        ) from error
    terminal.say(f"pushed {paths.shown(folder)}/ to {made.commit_url}")


def _first(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
