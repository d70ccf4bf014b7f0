"""Build `pydocs`: a small BEIR dataset from the docstrings of the running Python's standard library.

The first paragraph of a docstring is the query, the rest is its relevant passage. Sources are
parsed with `ast`; nothing is imported or downloaded. The split is by hash of the id, so it is the
same everywhere; the texts depend on the Python version (recorded answers were made on 3.11.7).

Writes   datasets/pydocs/corpus.jsonl, queries.jsonl, qrels/{train,dev,test}.tsv
Run      python datasets/build_pydocs.py
"""

import argparse
import ast
import hashlib
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from syntriever.data import dataset
from syntriever.files import jsonl, paths
from syntriever.run import cli, lineage, processes, terminal

SKIPPED_PARTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "_vendor", "__pycache__"}
QUERY_WORDS = range(5, 41)
MIN_PASSAGE_WORDS = 20
SPLITS = {0: "test", 1: "test", 2: "dev"}  # bucket -> split; the other buckets are train

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return cli.parser(__doc__).parse_args(argv)


def docstrings(node: ast.Module | ast.stmt, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of the public definitions below `node`, in source order."""
    for child in getattr(node, "body", []):
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            inner = f"{name}.{child.name}"
            text = ast.get_docstring(child)
            if text:
                yield inner, text
            yield from docstrings(child, inner)


def pairs(stdlib: Path) -> Iterator[tuple[str, str, str]]:
    """(id, query, passage) of every docstring long enough to be split; the first of a query wins."""
    seen = set()
    for path in terminal.progress(sorted(stdlib.rglob("*.py")), desc="parse", unit="file"):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if any(part in SKIPPED_PARTS or part.startswith("test_") for part in path.relative_to(stdlib).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old sources hold invalid escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates that ship as .py but are not Python
        module = ".".join(part for part in parts if part != "__init__")
        for name, text in docstrings(tree, module):
            head, _, rest = text.partition("\n\n")
            query, passage = " ".join(head.split()), " ".join(rest.split())
            if len(query.split()) in QUERY_WORDS and len(passage.split()) >= MIN_PASSAGE_WORDS and query not in seen:
                seen.add(query)
                yield name, query, passage


def main(args: argparse.Namespace) -> None:
    record = lineage.Record(args)
    target = paths.dataset("pydocs")
    target.parent.mkdir(parents=True, exist_ok=True)
    qrels: dict[str, dataset.Qrels] = {"train": {}, "dev": {}, "test": {}}
    with processes.lock(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".pydocs.") as folder:
        new = Path(folder) / "pydocs"
        new.mkdir()
        with (new / "corpus.jsonl").open("wb") as corpus, (new / "queries.jsonl").open("wb") as queries:
            for passage_id, query, passage in pairs(Path(sysconfig.get_paths()["stdlib"])):
                corpus.write(jsonl.dumps({"_id": passage_id, "title": "", "text": passage}))
                queries.write(jsonl.dumps({"_id": f"q-{passage_id}", "text": query}))
                split = SPLITS.get(int(hashlib.sha256(passage_id.encode()).hexdigest(), 16) % 10, "train")
                qrels[split][f"q-{passage_id}"] = {passage_id: 1}
        for split, judged in qrels.items():
            dataset.write_qrels(new / "qrels" / f"{split}.tsv", judged)
        counts = {split: len(judged) for split, judged in qrels.items()}
        record.write(new, **counts)
        if target.is_dir():
            target.rename(Path(folder) / "old")
        new.rename(target)
    total = ", ".join(f"{n} {split}" for split, n in counts.items())
    terminal.say(
        f"wrote  {paths.shown(target)}: {sum(counts.values())} query-passage pairs ({total}), Python {sys.version.split()[0]}"
    )
    terminal.next_command("datasets/parse_synthetic.py", "pydocs")


if __name__ == "__main__":
    sys.exit(cli.run(main, parse_args))
