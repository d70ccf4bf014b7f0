"""Every command in the documentation parses, every option in it exists, and every link leads somewhere."""

import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, load_script, write_jsonl

README = ROOT / "README.md"
GUIDES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md"]

# What stands in a command for a name of the reader's.
PLACEHOLDERS = {"DS": "scifact", "M": "e5"}
# Datasets of the reader's in the examples.
OWN = ["mydocs"]
SCRIPTS = ["datasets/parse_synthetic.py", "datasets/build_pydocs.py", "datasets/split_dev.py", "train_stage1.py", "retrieval.py"]
SCRIPTS += ["stage2/parse_comparison.py", "train_stage2.py", "evaluate.py", "datasets/generate_queries.py"]
# Programs that are not ours, and the shell's own words.
OTHERS = {"export", "source", "sleep", "break", "[", "vllm", "ollama", "llama-server", "tensorboard", "pip", "pre-commit", "git"}
KEYWORDS = {"until", "while", "do", "done", "if", "then", "fi"}
OPTIONS_OF_OTHERS = {"--logdir", "--port"}

OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
ASSIGNMENT = re.compile(r"([A-Z_]+)=.*", re.DOTALL)


def parts_of(page: Path) -> Iterator[tuple[int, str | None, str]]:
    """(number of its first line, language, text) of each fenced block of a page, and of each stretch
    between them, whose language is None."""
    language, start, lines = None, 1, []
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            yield start, language, "\n".join(lines)
            language = line.strip().removeprefix("```") if language is None else None
            start, lines = number + 1, []
        else:
            lines.append(line)
    assert language is None, f"{page.name}:{start}: the block is not closed"
    yield start, language, "\n".join(lines)


def prose(page: Path) -> str:
    return "\n".join(text for _, language, text in parts_of(page) if language is None)


def commands_in(block: str) -> Iterator[tuple[int, list[str]]]:
    """(offset of its line, words) of each command of a shell block."""
    lines = block.split("\n")
    while lines:
        offset, line = block.count("\n") + 1 - len(lines), lines.pop(0)
        while line.endswith("\\"):
            line = line[:-1] + lines.pop(0)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in KEYWORDS and not words:
                continue
            if set(word) <= set(";&|()"):
                if words:
                    yield offset, words
                words = []
            else:
                words.append(PLACEHOLDERS.get(word, word))


def all_commands() -> Iterator[object]:
    """A parameter (folder, words) for each command; `cd` holds to the end of its block, as it does in a shell."""
    for page in GUIDES:
        for start, language, block in parts_of(page):
            if language not in ("", "sh", "bash"):
                continue
            folder = ROOT
            for offset, words in commands_in(block):
                where = f"{page.relative_to(ROOT)}:{start + offset}"
                yield pytest.param(folder, words, id=f"{where} {' '.join(words[:3])}")
                if words[0] == "cd":
                    folder = folder / words[1]


def split_variables(words: list[str]) -> tuple[list[str], list[str]]:
    """(names of the variables that are set, the other words)."""
    names = [found[1] for word in words if (found := ASSIGNMENT.fullmatch(word))]
    return names, [word for word in words if not ASSIGNMENT.fullmatch(word)]


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The reader's datasets, since `evaluate.py` tells datasets from models by what is there."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    for name in OWN:
        write_jsonl(tmp_path / "datasets" / name / "corpus.jsonl", [{"_id": "p1", "title": "", "text": "A passage."}])


def parses(script, argv, capsys):
    try:
        script.parse_args(argv)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)


@pytest.mark.parametrize(("folder", "words"), all_commands())
def test_command_parses(folder, words, own_data, capsys):
    variables, (program, *rest) = split_variables(words) if words[0] not in OTHERS else ([], words)
    if program in ("make", "runs/study.sh", "runs/demo.sh"):
        known = "".join(path.read_text() for path in (ROOT / "Makefile", *(ROOT / "runs").glob("*.sh")))
        assert all(re.search(rf"\b{name}\b", known) for name in variables), f"nothing reads one of {variables}"
    if program == "make":
        for target in rest:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {target}"
    elif program == "cd":
        assert (folder / rest[0]).is_dir()
    elif program.startswith("runs/"):
        assert os.access(folder / program, os.X_OK), f"{program} is not there, or not executable"
    elif program in ("python", "torchrun"):
        if program == "torchrun":
            rest = rest[next(n for n, word in enumerate(rest) if not word.startswith("-")) :]
        if rest[0] == "-m":
            script, argv = importlib.import_module(rest[1]), rest[2:]
        else:
            assert (folder / rest[0]).is_file(), f"no script {rest[0]} in {folder}"
            script, argv = load_script(str((folder / rest[0]).relative_to(ROOT))), rest[1:]
        parses(script, argv, capsys)
    else:
        assert program in OTHERS, f"{program}: a typing error, or a program that OTHERS lacks"


@pytest.mark.parametrize(
    ("llm", "small"), [("replay", False), ("gpt-4o", False), ("qwen2.5-1.5b", True), ("gguf:model.gguf", True)]
)
def test_demo_parses(llm, small, own_data, tmp_path, capsys):
    """A small model may fail often and sees one passage at a time, in each command that asks it."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    given = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "LLM": llm}
    done = subprocess.run(["bash", ROOT / "runs" / "demo.sh"], env=given, capture_output=True, text=True, check=True)
    commands = [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("$ python ")]
    assert len(commands) == 10
    for name, *argv in commands:
        parses(load_script(name), argv, capsys)
        assert ("--max-failure-rate" in argv) == (small and "--llm" in argv)
        assert ("--pointwise" in argv) == (small and "--graded" in argv)


@pytest.fixture(scope="session")
def options():
    """All options of all scripts, from their help."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for script in [*map(load_script, SCRIPTS), importlib.import_module("syntriever.status")]:
            with pytest.raises(SystemExit):
                script.parse_args(["--help"])
    return OPTIONS_OF_OTHERS | set(re.findall(OPTION, said.getvalue()))


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_options_exist(page, options):
    named = {option for code in re.findall(r"`([^`]+)`", prose(page)) for option in re.findall(OPTION, code)}
    assert named <= options


def slugs(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(page), re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = 0
        while (unique := f"{slug}-{again}" if again else slug) in found:
            again += 1
        found.add(unique)
    return found


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue  # of the web: it is not looked up
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_readme_is_short_and_leads_to_every_guide():
    assert len(README.read_text("utf-8").splitlines()) <= 170
    assert {str(page.relative_to(ROOT)) for page in GUIDES[1:]} <= {link.partition("#")[0] for link in links(README)}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_python_examples_parse(page):
    for _, language, block in parts_of(page):
        if language == "python":
            ast.parse(block)


def test_layout_is_that_of_the_library():
    """docs/files.md names every module of the library, and no other."""
    (tree,) = [block for _, _, block in parts_of(ROOT / "docs/files.md") if "\nsyntriever/\n" in block]
    named, room = set(), ""
    for line in tree.partition("\nsyntriever/\n")[2].splitlines():
        if found := re.match(r"  (\w+/|\S)", line):
            room = found[1] if found[1].endswith("/") else ""
        named |= {f"{room}{name}" for name in re.findall(r"\w+\.py\b", line)}
    library = ROOT / "syntriever"
    assert named == {str(path.relative_to(library)) for path in library.rglob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_files_of_the_code_exist(page):
    named = re.findall(r"`((?:syntriever|bench|runs|tests|datasets|stage2)/[\w/]+\.(?:py|sh|json)|\w+\.py)`", prose(page))
    assert not [path for path in named if not (ROOT / path).is_file() and path not in {Path(script).name for script in SCRIPTS}]
