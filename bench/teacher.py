"""Benchmark of the LLM side against one loopback server with scripted latency (tests/llm_server.py).

Run      python bench/teacher.py                      all parts, about 25 minutes
         python bench/teacher.py rate flight          some of: rate, flight, memory, restart, local
         python bench/teacher.py local --llm gguf:FILE    tokens/s of a model that runs here
Peers    a loop that asks one request after the other with the OpenAI client; bespokelabs-curator, where
         --curator names a Python that has it (python -m venv V; V/bin/pip install bespokelabs-curator)
Writes   bench/teacher.json

Each client is a process of its own, so that its CPU time and peak memory are its own. Rates are of
whole calls: from the first request to the last row written, imports left out.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

MODEL = "gpt-4o"  # curator wants a name it knows


def prompt(n: int) -> str:
    return f"Write one passage of about 30 words on topic {n}."


# ---- the clients, each run in a process of its own


def syntriever(url: str, requests: int, workers: int, folder: Path) -> None:
    """What a stage does: estimate, ask through the ledger, append rows."""
    from syntriever.llm import address, asking, teachers
    from syntriever.llm.ledger import Request
    from syntriever.llm.rows import append_rows
    from syntriever.llm.server import OpenAITeacher

    parser = argparse.ArgumentParser()
    teachers.add_options(parser, 16)
    args = parser.parse_args([])

    async def work(asker: asking.Asker, n: int) -> dict:
        reply = await asker.ask(Request("write", (str(n),), prompt(n), 0.7, 64))
        return {"n": n, "text": reply.text} | ({"reason": reply.reason} if reply.reason else {})

    teacher = OpenAITeacher(MODEL, address.of(MODEL, url), workers, attempts=6, timeout=120)
    counts, _ = append_rows(
        folder / "rows.jsonl", folder / "rows.ledger.jsonl", range(requests), requests, work, teacher, args, "row"
    )
    assert counts["written"] == requests, counts


def loop(url: str, requests: int, workers: int, folder: Path) -> None:
    """The naive client."""
    import openai

    client = openai.OpenAI(api_key="none", base_url=url)
    with (folder / "rows.jsonl").open("w") as file:
        for n in range(requests):
            message = {"role": "user", "content": prompt(n)}
            reply = client.chat.completions.create(model=MODEL, messages=[message], temperature=0.7, max_tokens=64)
            file.write(json.dumps({"n": n, "text": reply.choices[0].message.content}) + "\n")


def curator(url: str, requests: int, workers: int, folder: Path) -> None:
    """bespokelabs-curator with its own limits lifted, and without display and telemetry. Its tokenizer
    has to be downloaded: single bytes stand in for it, which is less work."""
    import tiktoken

    single = tiktoken.Encoding("bytes", pat_str=".+", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={})
    tiktoken.get_encoding = tiktoken.encoding_for_model = lambda name: single
    from bespokelabs import curator as peer
    from datasets import Dataset

    class Ask(peer.LLM):
        def prompt(self, row: dict) -> str:
            return row["prompt"]

        def parse(self, row: dict, response: str) -> list:
            return [{"n": row["n"], "text": response}]

    limits = {"max_requests_per_minute": 10**7, "max_tokens_per_minute": 10**10, "max_concurrent_requests": workers}
    settings = {"temperature": 0.7, "max_tokens": 64}
    ask = Ask(model_name=MODEL, backend="openai", generation_params=settings, backend_params={"base_url": url, **limits})
    made = ask(Dataset.from_dict({"n": list(range(requests)), "prompt": [prompt(n) for n in range(requests)]}))
    assert len(made.dataset) == requests


CLIENTS = {client.__name__: client for client in (syntriever, loop, curator)}


def child(name: str, url: str, requests: int, workers: int, folder: Path) -> None:
    for module in {"syntriever": ("openai", "syntriever.llm.teachers"), "loop": ("openai",), "curator": ("datasets",)}[name]:
        __import__(module)
    started, cpu = time.monotonic(), time.process_time()
    CLIENTS[name](url, requests, workers, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak}
    (folder / "result.json").write_text(json.dumps({"client": name, "requests": requests, "workers": workers, **found}))


# ---- the measurements


@contextlib.contextmanager
def server(folder: Path, latency: float) -> Iterator[tuple[str, Path]]:
    """(address, ledger file) of a server process."""
    port, ledger = folder / "port", folder / "server.jsonl"
    command = [sys.executable, ROOT / "tests/llm_server.py", "--port-file", port, "--ledger", ledger, "--no-fsync"]
    with subprocess.Popen([*command, "--latency", str(latency), "--max-seconds", "7200"]) as process:
        try:
            while not port.exists():
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port.read_text()}/v1", ledger
        finally:
            process.terminate()


def run(name: str, python: str, latency: float, requests: int, workers: int) -> dict:
    """Figures of one client at work, with the requests in flight as the server saw them."""
    with tempfile.TemporaryDirectory() as temporary, server(Path(temporary), latency) as (url, ledger):
        folder = Path(temporary) / "client"
        folder.mkdir()
        env = {**os.environ, "OPENAI_API_KEY": "none", "SYNTRIEVER_HOME": temporary, "HOME": temporary}
        env |= {"TELEMETRY_ENABLED": "false", "CURATOR_DISABLE_RICH_DISPLAY": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        command = [python, __file__, "child", name, url, str(requests), str(workers), str(folder)]
        with (Path(temporary) / "log").open("w+") as log:
            if subprocess.run(command, env=env, stdout=log, stderr=log).returncode:
                log.seek(0)
                raise SystemExit(f"{name} failed:\n{log.read()[-3000:]}")
        found = json.loads((folder / "result.json").read_text())
        found["per_minute"] = 60 * requests / found["seconds"]
        found["cpu_ms_per_request"] = 1000 * found.pop("cpu_seconds") / requests
        peak, median = in_flight(ledger)
        return found | {"in_flight_peak": peak, "in_flight_median": median}


def in_flight(ledger: Path) -> tuple[int, int]:
    """Peak, and median over time, of the requests the server was working on."""
    now, peak, last, seconds = 0, 0, None, {}
    with ledger.open() as file:
        for row in map(json.loads, file):
            if last is not None:
                seconds[now] = seconds.get(now, 0.0) + row["t"] - last
            now, last = now + (1 if row["event"] == "received" else -1), row["t"]
            peak = max(peak, now)
    levels = sorted(seconds)
    sums = [sum(seconds[level] for level in levels[: n + 1]) for n in range(len(levels))]
    return peak, levels[bisect.bisect(sums, sums[-1] / 2)]


def show(rows: list[dict]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = (f"{row[n]:,.1f}" if isinstance(row[n], float) else f"{row[n]:,}" if n != "client" else row[n] for n in names)
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def rate(args: argparse.Namespace) -> list[dict]:
    """128 workers and 1 s latency: the ceiling is 7,680 a minute."""
    print("\n## 128 workers, 1 s latency (ceiling 7,680 a minute)\n")
    rows = [run("syntriever", sys.executable, 1.0, 128 * 40, 128), run("loop", sys.executable, 1.0, 40, 1)]
    if args.curator:
        rows.insert(1, run("curator", args.curator, 1.0, 128 * 40, 128))
        print(f"syntriever / curator: {rows[0]['per_minute'] / rows[1]['per_minute']:.2f}x")
    print(f"syntriever / loop: {rows[0]['per_minute'] / rows[-1]['per_minute']:.0f}x\n")
    show(rows)
    return rows


def flight(args: argparse.Namespace) -> list[dict]:
    """512 workers: at 5 s latency the server is the long pole, at none the client is."""
    print("\n## 512 workers, 5 s latency (ceiling 6,144 a minute), then none\n")
    rows = [run("syntriever", sys.executable, latency, requests, 512) for latency, requests in ((5.0, 512 * 8), (0.0, 10_000))]
    if args.curator:
        rows += [run("curator", args.curator, latency, requests, 512) for latency, requests in ((5.0, 512 * 8), (0.0, 10_000))]
    show(rows)
    return rows


def memory(args: argparse.Namespace) -> list[dict]:
    print("\n## Memory, 128 workers, no latency\n")
    rows = [run("syntriever", sys.executable, 0.0, requests, 128) for requests in (10_000, 200_000)]
    print(f"growth from 10k to 200k requests: {rows[1]['peak_mib'] - rows[0]['peak_mib']:.0f} MiB\n")
    show(rows)
    return rows


def restart(args: argparse.Namespace) -> list[dict]:
    """Time and memory to open a ledger of a million replies of about 100 words."""
    print("\n## Restart on a ledger of 1,000,000 replies\n")
    code = (
        "import json, resource, sys, time; from pathlib import Path; from syntriever.llm.ledger import Ledger\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; start = time.monotonic()\n"
        "ledger = Ledger(Path(sys.argv[1])); seconds = time.monotonic() - start\n"
        "assert ledger.get(f'{999_999:032x}', 1)\n"
        "grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024\n"
        "print(json.dumps({'seconds': seconds, 'grown_mib': grown}))"
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "big.ledger.jsonl"
        fields = {"model": MODEL, "step": "write", "item": ["q"], "reason": "", "finish_reason": "stop", "attempts": 1}
        fields |= {"prompt_tokens": 60, "completion_tokens": 130, "max_tokens": 400, "text": "seven letters " * 50}
        with path.open("w") as file:
            file.writelines(json.dumps({"key": f"{n:032x}", **fields}) + "\n" for n in range(1_000_000))
        size = path.stat().st_size / 2**20
        done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {"ledger_mib": size, **json.loads(done.stdout)}
    print(", ".join(f"{name} {value:,.1f}" for name, value in found.items()), flush=True)
    return [found]


def local(args: argparse.Namespace) -> list[dict]:
    """Tokens/s of a model that runs here: 32 replies of at most 64 tokens, then 32 verdicts on them, by requests at once."""
    from syntriever.llm import llama
    from syntriever.llm.ledger import Request

    async def ask(slots: int) -> dict:
        teacher, found = llama.LlamaTeacher(args.llm, slots, attempts=1), {"model": args.llm, "slots": slots}
        texts = [prompt(n) for n in range(32)]
        await teacher.answer(Request("start", (), "Hello", 0.0, 1))
        for step, limit, choices in (("write", 64, ()), ("verify", 16, ("yes", "no"))):
            started = time.monotonic()
            replies = await asyncio.gather(*(teacher.answer(Request(step, (), text, 0.0, limit, choices)) for text in texts))
            seconds, tokens = time.monotonic() - started, sum(reply.completion_tokens for reply in replies)
            read = sum(reply.prompt_tokens for reply in replies)
            found |= {f"{step}_seconds": seconds, f"{step}_tokens_per_s": tokens / seconds, f"{step}_prompt_tokens": read}
            texts = [f"Is this a good passage? Answer with one word, yes or no.\n\n{reply.text}" for reply in replies]
        await teacher.close()
        print(found, flush=True)
        return found

    print("\n## A model that runs here\n")
    return [asyncio.run(ask(slots)) for slots in (1, 8, 16)]


PARTS = {part.__name__: part for part in (rate, flight, restart, memory, local)}


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        name, url, requests, workers, folder = sys.argv[2:]
        child(name, url, int(requests), int(workers), Path(folder))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--curator", help="Python of an environment with bespokelabs-curator")
    parser.add_argument("--llm", default="smollm2", help="the model of the part `local` (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    found = {name: PARTS[name](args) for name in args.parts or PARTS}
    (ROOT / "bench" / "teacher.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
