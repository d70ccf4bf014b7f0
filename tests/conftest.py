"""A tiny dataset from real docstrings, a tiny random encoder, and a way to run a script in-process."""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The machine may be slow, and no test may depend on it.
slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("offline", derandomize=True, max_examples=200, database=None, **slow)
settings.load_profile("offline")
FAST = ["--batch-size", "12", "--lr", "1e-3", "--max-length", "32", "--device", "cpu"]
SFT = "e5-small-tiny-sft"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def file_size_limit(size):
    """A full disk: no file grows beyond `size` bytes (Python ignores SIGXFSZ, so writing raises)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def load_script(path):
    """Import a script by path: `datasets/` is no package, and must not become one."""
    name = "script_" + path.replace("/", "_").removesuffix(".py")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def run_script(capsys, monkeypatch):
    """run_script("train_stage1.py", "minilm", "tiny") -> (exit code, stdout, stderr)."""
    from syntriever.run import cli

    def run(path, *argv):
        script = load_script(path)
        monkeypatch.setattr(sys, "argv", [str(ROOT / path), *map(str, argv)])
        capsys.readouterr()
        try:
            code = cli.run(script.main, lambda: script.parse_args(list(map(str, argv))))
        except SystemExit as error:  # argparse
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def library(model, texts, kind):
    """Vectors by sentence-transformers itself."""
    return model.encode(list(texts), prompt=model.prompts[kind] or None, normalize_embeddings=True, show_progress_bar=False)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def make_dataset(folder, pairs):
    """BEIR folder of (id, query, passage): the first 60% train, then dev, then test."""
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "title": "", "text": passage} for i, _, passage in pairs])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q-{i}", "text": query} for i, query, _ in pairs])
    cuts = [0, len(pairs) * 6 // 10, len(pairs) * 8 // 10, len(pairs)]
    (folder / "qrels").mkdir()
    for split, (start, stop) in zip(("train", "dev", "test"), itertools.pairwise(cuts), strict=True):
        rows = [f"q-{i}\t{i}\t1\n" for i, _, _ in pairs[start:stop]]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), "utf-8")


@pytest.fixture(scope="session")
def docstrings():
    """60 (id, query, passage) of the standard library."""
    pairs = load_script("datasets/build_pydocs.py").pairs(Path(sysconfig.get_paths()["stdlib"]))
    return list(itertools.islice(pairs, 60))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, docstrings):
    """A random two-layer BERT with its own vocabulary, saved as a plain transformers checkpoint.
    Its name makes it an E5 model, so prefixes are in play. No dropout: runs are comparable."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder") / "e5-small-tiny"
    folder.mkdir()
    # Characters and the commonest words: a trained vocabulary is another one each time.
    words = Counter(re.findall(r"\w+|[^\w\s]", " ".join(text for pair in docstrings for text in pair).lower()))
    letters = sorted(set("".join(words)))
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(word for word, _ in words.most_common() if len(word) > 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces][:600]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, docstrings):
    """Data folder with the dataset `tiny` and synthetic rows for most of its training queries."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    fill_home(tmp_path, docstrings)
    return tmp_path


def fill_home(folder, docstrings):
    make_dataset(folder / "datasets" / "tiny", docstrings)
    train = docstrings[: len(docstrings) * 6 // 10]
    rows = [
        {
            "query_id": f"q-{i}",
            "query": query,
            "cot": f"Somebody wants to know: {query}",
            "positive": " ".join(passage.split()[:15]),
            "negative": " ".join(train[number - 1][2].split()[:15]),
            "verified": number % 4 != 0,
        }
        for number, (i, query, passage) in enumerate(train)
        if number % 6 != 5
    ]
    write_jsonl(folder / "datasets" / "tiny_synthetic.jsonl", rows)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_encoder, docstrings):
    """A data folder in which stage 1 was run, once for all tests."""
    folder = tmp_path_factory.mktemp("trained")
    fill_home(folder, docstrings)
    from syntriever.run import cli

    script = load_script("train_stage1.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTRIEVER_HOME", str(folder))
        args = [str(tiny_encoder), "tiny", "--loss", "snn", "--epochs", "2", *FAST]
        patch.setattr(sys, "argv", [str(ROOT / "train_stage1.py"), *args])
        assert cli.run(script.main, script.parse_args) == 0
    return folder


@pytest.fixture
def stage1(home, trained):
    shutil.copytree(trained, home, dirs_exist_ok=True)
    return home / "output" / f"{SFT}-tiny"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Data folder with the dataset `tiny`: 12 training queries, 20 passages."""
    from llm_lab import ADVERSARY

    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    pairs = [(f"p{n:02}", f"Which is topic {n:02}?", f"Passage number {n:02} is about topic {n:02}.") for n in range(20)]
    pairs[3] = ("p03", "Where do {positive} and {query} of topic 03 stand?", ADVERSARY)
    make_dataset(tmp_path / "datasets" / "tiny", pairs)
    return tmp_path


@pytest.fixture
def run(lab, run_script):
    """run(server, SYNTHESIS, *options, code=0): what the script said (on stderr if it fails), after a check of its exit code."""
    from llm_lab import COMPARISON

    def run(server, script, *options, code=0):
        given = ["--llm", "judge", "--base-url", server.url] if server else []
        given += ["--model", "e5"] if script == COMPARISON else []
        found, out, err = run_script(script, "tiny", *given, *options)
        assert found == code, err
        return err if code else out

    return run


@pytest.fixture(scope="session")
def tiny_colbert(tiny_encoder, tmp_path_factory):
    """The tiny encoder in the format of Stanford's ColBERT checkpoints: projection beside the weights of
    the backbone, query expansion, markers, and lengths in `artifact.metadata`."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("colbert") / "tinycolbert"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["linear.weight"] = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)) * 0.2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"doc_maxlen": 48, "query_maxlen": 16, "mask_punctuation": True, "attend_to_mask_tokens": False}
    (folder / "artifact.metadata").write_text(json.dumps(settings))
    return folder
