"""Every command that is printed works as it is printed: `next:` lines to the end, and every remedy of a refusal."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, digest, write_jsonl
from llm_lab import COMPARISON, SYNTHESIS, rows
from llm_server import LLMServer

from syntriever.data import download, hub_dataset
from syntriever.encode import models
from syntriever.files import paths

STATUS = "syntriever/status.py"
# Settings for speed alone.
TINY = {
    "train_stage1.py": ["--epochs", "1", "--batch-size", "12", "--max-length", "32", "--candidates", "8"],
    "train_stage2.py": ["--epochs", "1", "--max-length", "32"],
    COMPARISON: ["--pairs", "1"],
}
NEXT = re.compile(r"^next: +(python .*)$", re.M)
REMEDY = re.compile(r"Run(?: again)?: (python .*?)(?:   \(|$)", re.M)


@pytest.fixture
def server(home, tiny_encoder, monkeypatch):
    """A teacher, and an encoder of the Hub that is here."""
    monkeypatch.setitem(models.ALIASES, "e5", (str(tiny_encoder), models.E5))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(download, "NAMED", {})
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **options: None)  # half of the time
    with LLMServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield server


@pytest.fixture
def typed(server, run_script):
    """typed("python train_stage1.py e5 tiny") -> (exit code, stdout, stderr), with settings for speed."""

    def typed(command):
        program, script, *argv = shlex.split(command)
        assert program == "python"
        script = str(Path(script).resolve().relative_to(ROOT))
        return run_script(script, *argv, *TINY.get(script, []))

    return typed


@pytest.fixture
def follow(typed):
    """follow(command): run it and then each `next:` line to the end; the commands."""

    def follow(command):
        done = [command]
        while True:
            code, out, err = typed(done[-1])
            assert code == 0, f"{done}\n{err}"
            found = NEXT.findall(out)
            if not found:
                return done
            assert len(found) == 1
            done += found

    return follow


@pytest.fixture
def mended(typed):
    """mended(command): run it, after the remedies that it and they print; the commands that came to an end, in order."""

    def mended(command, done=()):
        for _ in range(9):
            code, _, err = typed(command)
            if code == 0:
                return [*done, command]
            assert code == 2, err
            (remedy,) = REMEDY.findall(err)
            done = mended(remedy, done)
        raise AssertionError(f"{command} is not mended by what it says: {err}")

    return mended


def test_the_next_lines_lead_from_synthesis_to_the_measures(home, follow):
    paths.synthetic("tiny").unlink()
    assert follow(f"python {SYNTHESIS} tiny") == [
        f"python {SYNTHESIS} tiny",
        "python train_stage1.py e5 tiny",
        "python retrieval.py e5-sft tiny",
        f"python {COMPARISON} tiny --model e5-sft",
        "python train_stage2.py e5-sft tiny",
        "python evaluate.py bm25 e5 e5-sft e5-final tiny",
    ]


def test_the_next_lines_carry_an_own_folder_a_name_and_top_k(home, tiny_encoder, follow, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own models") / "my encoder"
    shutil.copytree(tiny_encoder, folder)
    done = follow(f"python train_stage1.py {shlex.quote(str(folder))} tiny --name mine")
    assert done[1:4] == [
        "python retrieval.py mine-sft tiny",
        f"python {COMPARISON} tiny --model mine-sft",
        "python train_stage2.py mine-sft tiny",
    ]
    done = follow(f"python retrieval.py {shlex.quote(str(folder))} tiny --name mine --top-k 8")
    assert [shlex.split(command)[1] for command in done] == ["retrieval.py", COMPARISON, "train_stage2.py", "evaluate.py"]
    assert [path.name for path in (home / "stage2").glob("mine_*top*.jsonl")] == ["mine_tiny_top8.jsonl"]
    assert (home / "results" / "mine-final_tiny_test.json").is_file()


def test_the_next_lines_of_an_own_checkpoint_under_another_name(home, follow):
    follow("python train_stage1.py e5 tiny --name first")
    done = follow("python retrieval.py first-sft tiny --name second --top-k 9")
    assert done[-1] == "python evaluate.py bm25 e5 first-sft second-final tiny"


def test_remedies_lead_from_nothing_to_the_measures(home, mended):
    paths.synthetic("tiny").unlink()
    done = mended("python evaluate.py e5-final tiny")
    assert done == [
        f"python {SYNTHESIS} tiny",
        "python train_stage1.py e5 tiny",
        "python retrieval.py e5-sft tiny",
        f"python {COMPARISON} tiny --model e5-sft",
        "python train_stage2.py e5-sft tiny",
        "python evaluate.py e5-final tiny",
    ]


def test_remedies_carry_an_own_folder_a_name_and_top_k(home, tiny_encoder, mended):
    done = mended(f"python {COMPARISON} tiny --model {tiny_encoder} --name mine --top-k 8")
    assert done[0] == f"python retrieval.py {tiny_encoder} tiny --name mine --top-k 8"
    shutil.rmtree(home / "stage2")
    assert (
        mended(f"python train_stage2.py {tiny_encoder} tiny --name mine")[0]
        == f"python retrieval.py {tiny_encoder} tiny --name mine"
    )


@pytest.mark.parametrize("first", ["train_stage1.py e5", "retrieval.py e5-sft", "train_stage2.py e5-sft"])
def test_remedies_name_a_dataset_of_the_hub_that_is_not_here_yet(home, mended, monkeypatch, first):
    def fetch(repository, folder):
        assert repository == "me/hub-tiny"
        shutil.copytree(home / "datasets" / "tiny", folder)

    monkeypatch.setattr(hub_dataset, "fetch", fetch)
    done = mended(f"python {first} hf:me/hub-tiny")
    assert done[0] == f"python {SYNTHESIS} hf:me/hub-tiny"
    assert all("hf:me/hub-tiny" in command for command in done)


def test_the_remedy_of_a_stale_input_runs_it_again(home, tiny_encoder, typed, mended):
    assert typed(f"python train_stage1.py {tiny_encoder} tiny --name mine")[0] == 0
    assert typed("python retrieval.py mine-sft tiny --top-k 7")[0] == 0
    queries = paths.queries("tiny")
    write_jsonl(queries, [{**row, "text": row["text"] + "?"} for row in rows(queries)])
    done = mended(f"python {COMPARISON} tiny --model mine-sft --top-k 7")
    assert [shlex.split(command)[1] for command in done] == ["train_stage1.py", "retrieval.py", COMPARISON]
    assert "--name mine" in done[0]


def test_a_base_that_nobody_knows_is_not_guessed(home, typed):
    code, _, err = typed("python retrieval.py mine-sft tiny")
    assert (code, REMEDY.findall(err)) == (2, [])
    assert "It is trained by python train_stage1.py MODEL tiny --name mine" in err


@pytest.mark.parametrize("where", ["root", "stage2", "elsewhere"])
def test_scripts_are_named_from_where_the_user_stands(home, typed, monkeypatch, where):
    folder = {"root": ROOT, "stage2": ROOT / "stage2", "elsewhere": home}[where]
    script = {"root": "retrieval.py", "stage2": "../retrieval.py", "elsewhere": str(ROOT / "retrieval.py")}[where]
    monkeypatch.chdir(folder)
    code, out, err = typed(f"python {ROOT}/train_stage1.py e5 tiny")
    assert code == 0, err
    assert NEXT.findall(out) == [f"python {script} e5-sft tiny"]
    assert typed(NEXT.findall(out)[0])[0] == 0


def test_status_names_commands_that_work(home, tiny_encoder, typed):
    """From an own folder, also where stage 1 was interrupted or has to be run again."""
    first = f"python train_stage1.py {tiny_encoder} tiny --name mine"
    begun = home / "output" / ".mine-sft-tiny.tmp" / "checkpoint-1"
    begun.mkdir(parents=True)
    (begun / "state.json").write_text(f'{{"settings": {{"model": "{tiny_encoder}"}}}}')
    done = []
    while True:
        code, out, err = typed(f"python {STATUS} tiny")
        assert code == 0, err
        found = NEXT.findall(out)
        if not found:
            break
        done += found
        assert len(done) < 9
        code, _, err = typed(found[0])
        assert code == 0, err
    assert [shlex.split(command)[1] for command in done] == [
        "train_stage1.py",
        "retrieval.py",
        COMPARISON,
        "train_stage2.py",
        "evaluate.py",
    ]
    assert done[0] == first
    assert done[-1] == f"python evaluate.py bm25 {tiny_encoder} mine-sft mine-final tiny"
    assert "mine is complete" in out
    before = digest(home / "output" / "mine-sft-tiny" / "model.safetensors")
    queries = paths.queries("tiny")
    write_jsonl(queries, [{**row, "text": row["text"] + "?"} for row in rows(queries)])
    _, out, _ = typed(f"python {STATUS} tiny")
    assert NEXT.findall(out)[0].startswith(first)
    assert typed(NEXT.findall(out)[0])[0] == 0
    assert digest(home / "output" / "mine-sft-tiny" / "model.safetensors") != before


def without_labels(body):
    """Queries of the first words of a passage, and grades."""
    prompt = body["messages"][0]["content"]
    if prompt.startswith("Write search queries"):
        words = re.search(r"\n<(\S+)>\n(.*?)\n</\1>", prompt, re.S)[2].split()
        return f"question: How does {' '.join(words[:4])} work?\nkeywords: {' '.join(words[4:8])}"
    return "\n".join(f"{n}: {len(text) % 4}" for n, text in enumerate(re.findall(r"\nPassage \d+:\n.*?\n(.*)", prompt), 1))


DOCUMENTS = [
    "python datasets/generate_queries.py notes",
    "python retrieval.py e5 notes --fuse",
    f"python {COMPARISON} notes --graded --model e5",
    "python train_stage1.py e5 notes --judgements llm",
    "python evaluate.py bm25 e5 e5-sft notes --split judged",
]


@pytest.mark.parametrize("by", ["status", "next"])
def test_documents_alone_lead_to_a_measured_retriever(home, server, typed, follow, docstrings, by):
    server.reply = without_labels
    write_jsonl(paths.corpus("notes"), [{"_id": name, "text": text} for name, _, text in docstrings])
    if by == "next":
        done = follow(DOCUMENTS[0])
        assert [shlex.split(command)[1] for command in done] == [shlex.split(command)[1] for command in DOCUMENTS]
        code, out, err = typed("python retrieval.py e5-sft notes --fuse")  # the second round
        assert code == 0, err
        done = follow(NEXT.findall(out)[0])
        assert [shlex.split(command)[1] for command in done] == [COMPARISON, "train_stage2.py", "evaluate.py"]
        assert done[-1] == "python evaluate.py bm25 e5 e5-sft e5-final notes --split judged"
    for command in DOCUMENTS if by == "status" else ():
        code, out, err = typed(f"python {STATUS} notes")
        assert (code, NEXT.findall(out)) == (0, [command]), err
        code, _, err = typed(command)
        assert code == 0, err
    code, out, _ = typed(f"python {STATUS} notes")
    assert "e5 is complete" in out
    assert not re.search("^(stale|missing)", out, re.M)


def test_pydocs_names_its_builder(tmp_path, monkeypatch, run_script):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    code, _, err = run_script(SYNTHESIS, "pydocs", "--llm", "replay")
    assert (code, REMEDY.findall(err)) == (2, ["python datasets/build_pydocs.py"])
