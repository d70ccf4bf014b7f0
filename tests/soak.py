"""The whole pipeline on pydocs, once undisturbed and once under kills, full disks and a teacher that fails: both must
end in the same files. No pytest: it takes long.

Run      make soak                          about 15 minutes on two cores
         python tests/soak.py --kills 10    kills of each stage
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from llm_server import LLMServer

# All that passes when the request is sent again.
FAULTS = {
    "429": 0.1,
    "429-ms": 0.05,
    "500": 0.1,
    "502-html": 0.05,
    "bad-json": 0.05,
    "cut-json": 0.05,
    "reset": 0.1,
    "truncated": 0.05,
}
SHORT = ["--max-length", "24", "--device", "cpu"]
TRAINING = [*SHORT, "--epochs", "1", "--dev-pool", "100", "--save-minutes", "0.05", "--resume"]

WRITTEN = ["--queries", "generated", "--name", "minilm-free"]  # beside those with labels

# Name, command, and the size in bytes of a file at which its disk is full.
STAGES: list[tuple[str, list[str], int]] = [
    ("build", ["datasets/build_pydocs.py"], 100_000),
    ("queries", ["datasets/generate_queries.py", "pydocs", "--passages", "150", "LLM"], 30_000),
    ("synthesis", ["datasets/parse_synthetic.py", "pydocs", "--limit", "100", "LLM"], 60_000),
    ("stage 1", ["train_stage1.py", "minilm", "pydocs", *TRAINING], 30_000_000),
    ("retrieval", ["retrieval.py", "minilm-sft", "pydocs", *SHORT], 200_000),
    (
        "comparison",
        ["stage2/parse_comparison.py", "pydocs", "--model", "minilm-sft", "--limit", "100", "--pairs", "3", "LLM"],
        20_000,
    ),
    ("stage 2", ["train_stage2.py", "minilm-sft", "pydocs", *TRAINING], 30_000_000),
    ("evaluation", ["evaluate.py", "minilm-final", "pydocs", *SHORT], 100_000),
    ("candidates", ["retrieval.py", "minilm", "pydocs", *WRITTEN, "--fuse", *SHORT], 50_000),
    ("grading", ["stage2/parse_comparison.py", "pydocs", "--model", "minilm", *WRITTEN, "--graded", "LLM"], 20_000),
    ("graded stage 1", ["train_stage1.py", "minilm", "pydocs", *WRITTEN, "--judgements", "llm", *TRAINING], 30_000_000),
    ("judged evaluation", ["evaluate.py", "minilm", "minilm-free-sft", "pydocs", "--split", "judged", *SHORT, "LLM"], 20_000),
]


def start(command: list[str], home: Path, url: str | None, log: Path, disk: int | None = None) -> subprocess.Popen[bytes]:
    """`url`: the teacher's; None is the one that runs here."""
    teacher = ["--llm", "teacher", "--base-url", url, "--concurrency", "16", "--attempts", "20"] if url else ["--llm", "smollm2"]
    argv = [part for word in command for part in (teacher if word == "LLM" else [word])]
    env = {**os.environ, "SYNTRIEVER_HOME": str(home), "OPENAI_API_KEY": "sk-soak", "OMP_NUM_THREADS": "1"}

    def limits() -> None:
        if disk is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))

    with log.open("ab") as file:
        argv = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
        return subprocess.Popen(argv, env=env, stdout=file, stderr=file, start_new_session=True, preexec_fn=limits)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(home: Path) -> dict[str, Any]:
    """What must not depend on how often a run was disturbed. LLM rows come in any order, and tell how often they were asked."""

    def rows(path: Path, *kept: str) -> list[str]:
        return sorted(json.dumps([json.loads(line)[name] for name in kept]) for line in path.read_bytes().splitlines())

    found: dict[str, Any] = {
        path: sha256(home / path) for path in ("datasets/pydocs/corpus.jsonl", "datasets/pydocs/queries.jsonl")
    }
    found["generated"] = sha256(home / "datasets/pydocs_generated.jsonl")  # put in order when it is complete
    found["synthetic"] = rows(home / "datasets/pydocs_synthetic.jsonl", "query_id", "cot", "positive", "negative", "verified")
    for name in ("minilm-sft-pydocs", "minilm-final-pydocs", "minilm-free-sft-pydocs"):
        found[name] = sha256(home / "output" / name / "model.safetensors")
    found["top"] = sha256(home / "stage2/minilm-sft_pydocs_top100.jsonl")
    found["preferences"] = rows(home / "stage2/minilm-sft_pydocs_preferences.jsonl", "query_id", "preferred_id", "rejected_id")
    found["grades"] = rows(home / "stage2/minilm-free_pydocs_judgements.jsonl", "query_id", "grades")
    found["judged"] = sha256(home / "datasets/pydocs/qrels/judged.tsv")
    measured = json.loads((home / "results/minilm-final_pydocs_test.json").read_text())
    return found | {"measures": measured["per_query"]}


def check(condition: bool, message: str, log: Path) -> None:
    if not condition:
        raise SystemExit(f"soak: {message}\n{log.read_text()[-3000:]}")


def calm(home: Path) -> dict[str, float]:
    """Seconds of each stage."""
    seconds = {}
    with LLMServer(latency=0.02) as server:
        for name, command, _ in STAGES:
            started = time.monotonic()
            check(start(command, home, server.url, home / "log").wait() == 0, f"undisturbed {name} failed", home / "log")
            seconds[name] = time.monotonic() - started
            print(f"undisturbed: {name} {seconds[name]:.0f} s", flush=True)
    return seconds


def storm(home: Path, seconds: dict[str, float], kills: int, rng: random.Random) -> None:
    with LLMServer(latency=0.02, faults=FAULTS, retry_after=0.2) as server:
        for name, command, disk in STAGES:
            full = start(command, home, server.url, home / "log", disk).wait()
            check(full == 1, f"{name} on a full disk: exit {full}, not 1", home / "log")
            done = 0
            for _ in range(kills):
                process = start(command, home, server.url, home / "log")
                try:
                    code = process.wait(timeout=rng.uniform(0.05, 0.8) * max(8, seconds[name]))  # it may be quicker than the kill
                    check(code == 0, f"{name} after {done} kills: exit {code}", home / "log")
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, 9)
                    process.wait()
                    done += 1
            code = start(command, home, server.url, home / "log").wait()
            check(code == 0, f"{name} after {done} kills: exit {code}", home / "log")
            print(f"disturbed: {name}: disk full, then {done} kills, then complete", flush=True)
        failed = sum(row["event"] == "answered" and row["fault"] is not None for row in server.rows)
        print(f"disturbed: the teacher answered {len(server.requests):,} requests, {failed:,} of them with a fault", flush=True)


LLAMA = ["--limit", "20", "--max-failure-rate", "1"]  # the model is too small to be good
LLAMA_STAGES: list[tuple[list[str], str, int]] = [  # command, its ledger, replies before the kill
    (["datasets/build_pydocs.py"], "", 0),
    (
        ["datasets/parse_synthetic.py", "pydocs", "--max-tokens", "60", *LLAMA, "LLM"],
        "datasets/pydocs_synthetic.ledger.jsonl",
        25,
    ),
    (["retrieval.py", "minilm", "pydocs", *SHORT], "", 0),
    (
        ["stage2/parse_comparison.py", "pydocs", "--model", "minilm", "--k", "3", *LLAMA, "LLM"],
        "stage2/pydocs_preferences.ledger.jsonl",
        20,
    ),
]


def llama(home: Path) -> None:
    """20 queries through llama.cpp's server, each LLM stage killed once: no reply is lost, none is asked for again."""
    for command, ledger, enough in LLAMA_STAGES:
        before = b""
        if ledger:
            process = start(command, home, None, home / "log")
            while (home / ledger).is_file() is False or (home / ledger).read_bytes().count(b"\n") < enough:
                check(process.poll() is None, f"{command[0]} ended before it was killed", home / "log")
                time.sleep(0.05)
            os.killpg(process.pid, 9)
            process.wait()
            before = (home / ledger).read_bytes().rpartition(b"\n")[0]
        found = []
        for _ in range(2 if ledger else 1):
            code = start(command, home, None, home / "log").wait()
            check(code == 0, f"{command[0]} with llama.cpp: exit {code}", home / "log")
            found.append((home / ledger).read_bytes() if ledger else b"")
        keys = [json.loads(line)["key"] for line in found[0].splitlines()]
        check(found[0].startswith(before), f"{ledger} lost replies", home / "log")
        check(found[0] == found[-1] and len(keys) == len(set(keys)), f"{ledger}: a reply was paid twice", home / "log")
        print(f"llama.cpp: {command[0]}{f', killed after {enough} of {len(keys)} replies' if ledger else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each stage at most (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        homes = [Path(folder) / name for name in ("calm", "storm", "llama")]
        for home in homes:
            home.mkdir()
        llama(homes.pop())
        storm(homes[1], calm(homes[0]), args.kills, random.Random(args.seed))
        expected, found = map(outcome, homes)
        other = [name for name in expected if expected[name] != found[name]]
        if other:
            raise SystemExit(f"soak: not the same as undisturbed: {', '.join(other)}")
        left = [str(path) for path in homes[1].rglob("*.tmp*") if path.is_file()]
        print(f"soak: {', '.join(expected)} are the same; {len(left)} temporary files were left {left[:5]}")


if __name__ == "__main__":
    main()
