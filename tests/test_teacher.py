"""The teacher's parts: ledger, replay, cost, tokenizers, pace, adaption to servers, the judge's report."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import llm_server
import pytest
from conftest import ROOT, load_script, make_dataset, write_jsonl
from llm_lab import COMPARISON, STEPS, SYNTHESIS, asked, prompt_of, retrieve, rows, step_of
from llm_server import Answer, LLMServer, default_reply, failure

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm import address, asking, cost
from syntriever.llm.ledger import Ledger, Reply, Request
from syntriever.llm.pace import Pace, _seconds
from syntriever.llm.server import OpenAITeacher
from syntriever.report import judge

ONE = Request("cot", ("q",), "Why?", 0.7, 100)
VERDICT = Request("compare", ("q", "a", "b"), "Better?", 0.0, 16, ("1", "2", "tie"))
PRICED = {"date": "2026-01", "batch_factor": 0.5, "models": {"judge": [1000.0, 2000.0]}}


def unordered(path):
    """The rows, apart from their order and the name of the teacher."""
    return sorted(json.dumps({**row, "llm": ""}) for row in rows(path)) if path.exists() else []


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Data folder with the dataset `tiny`: 12 training queries, 20 passages; the model `judge` has a price."""
    home = tmp_path / "home"
    monkeypatch.setenv("SYNTRIEVER_HOME", str(home))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    make_dataset(home / "datasets" / "tiny", [(f"p{n:02}", f"Which is topic {n:02}?", f"Number {n:02}.") for n in range(20)])
    monkeypatch.setattr(cost, "PRICES", tmp_path / "prices.json")
    cost.PRICES.write_text(json.dumps(PRICED))
    return home


@pytest.fixture
def run(lab, run_script):
    """run(server, SYNTHESIS, *options, code=0): what the script said (on stderr if it fails), after a check of its exit code."""

    def run(server, script, *options, code=0):
        given = ["--llm", "judge", "--base-url", server.url] if server else ["--llm", "replay"]
        given += ["--model", "e5"] if script == COMPARISON else []
        found, out, err = run_script(script, "tiny", *given, *options)
        assert found == code, err
        return err if code else out

    return run


def filled(path, requests, reply=None):
    with contextlib.closing(Ledger(path)) as ledger:
        for request in requests:
            ledger.add(request.key("judge"), request, "judge", reply or Reply("text", "", "stop", 5, 7))
    return path


def ask(server, requests, concurrency=8, attempts=2, **attributes):
    """Replies of a teacher to many requests at once."""

    async def ask_all():
        teacher = OpenAITeacher("judge", address.of("judge", server.url), concurrency, attempts, 60)
        vars(teacher).update(attributes)
        async with asyncio.timeout(60):
            asker = asking.Asker(teacher)
            replies = await asyncio.gather(*(asker.ask_verdict(r) if r.choices else asker.ask(r) for r in requests))
        await teacher.close()
        return replies

    return asyncio.run(ask_all())


def numbered(request, number):
    return [replace(request, prompt=f"{request.prompt} {n}") for n in range(number)]


# --- ledger


def test_address_is_of_what_decides_the_reply():
    same = [replace(ONE, max_tokens=1), replace(ONE, step="negative"), replace(ONE, item=("other",))]
    assert {request.key("m") for request in same} == {ONE.key("m")}
    other = [replace(ONE, prompt="Why? "), replace(ONE, temperature=0.0), replace(ONE, choices=("yes", "no"))]
    assert len({ONE.key("m"), ONE.key("n"), *(request.key("m") for request in other)}) == 5


def test_truncated_reply_is_asked_again_only_under_a_higher_limit(run):
    def fault(body, attempt):
        return "length" if step_of(body) == "positive" and "topic 05" in prompt_of(body) and body["max_tokens"] < 300 else None

    with LLMServer(fault=fault) as server:
        for limit, expected in ((200, 47), (200, 0), (100, 0), (250, 1), (300, 2), (400, 0)):
            run(server, SYNTHESIS, "--max-tokens", limit)
            assert asked(server).total() == expected, limit
    assert len(rows(paths.synthetic("tiny"))) == 12


def test_unusable_replies_alone_are_dropped_on_demand_and_the_last_row_of_a_key_wins(tmp_path):
    path, reasons = tmp_path / "ledger.jsonl", ["refusal", "length", "unparsable", "bad_request", "context_length", "empty", ""]
    requests = numbered(ONE, len(reasons))
    for request, reason in zip(requests, reasons, strict=True):
        filled(path, [request], Reply("first", "", "stop"))
        filled(path, [request], Reply("last", reason, "length" if reason == "length" else "stop"))
    filled(path, [numbered(ONE, 8)[7]], Reply("", "refusal", "stop"))
    filled(path, [numbered(ONE, 8)[7]], Reply("last", "", "stop"))
    for again in (False, True):
        ledger = Ledger(path, retry_failed=again)
        found = [ledger.get(request.key("judge"), 100) for request in numbered(ONE, 8)]
        assert [reply and (reply.text, reply.reason) for reply in found] == [
            None if again and reason else ("last", reason) for reason in [*reasons, ""]
        ]
        ledger.close()


@pytest.mark.parametrize("left", [0, 1, 30, -1])
def test_torn_last_row_is_cut_by_a_live_run_and_left_out_by_a_reader(tmp_path, left):
    path = filled(tmp_path / "ledger.jsonl", numbered(ONE, 3))
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    torn = whole[: start + left] if left >= 0 else whole[:-1]
    path.write_bytes(torn)
    for read_only in (True, False):
        ledger = Ledger(path, read_only=read_only)
        assert [bool(ledger.get(request.key("judge"), 1)) for request in numbered(ONE, 3)] == [True, True, left < 0]
        ledger.close()
        assert path.read_bytes() == (torn if read_only else whole if left < 0 else whole[:start])


BAD_ROWS = [b"{", b"5", b"\xff", b'{"key": "00"}', b'{"key": "x"%s}', b'{"key": 5%s}', b'{"key": "00"%s, "attempts": "1"}']


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_malformed_row_is_named(tmp_path, bad):
    path = filled(tmp_path / "ledger.jsonl", [ONE])
    rest = json.dumps({name: value for name, value in rows(path)[0].items() if name != "key"}).encode()[1:-1]
    path.write_bytes(path.read_bytes() + bad.replace(b"%s", b", " + rest) + b"\n" + path.read_bytes())
    for read_only in (True, False):
        with pytest.raises(BadInput, match=r"ledger\.jsonl:2: "):
            Ledger(path, read_only=read_only)


def test_memory_does_not_grow_with_the_replies(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    row = {"step": "cot", "item": ["q"], "model": "m", "max_tokens": 1, "text": "", "reason": "", "finish_reason": "stop"}
    end = json.dumps({**row, "prompt_tokens": 1, "completion_tokens": 1, "attempts": 1})[1:]
    path, size = tmp_path / "ledger.jsonl", {}
    for number in (10_000, 200_000):
        path.write_text(
            "".join(f'{{"key": "{n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}", {end}\n' for n in range(number))
        )
        ledger = Ledger(path)
        size[number] = resident()
        assert ledger.used("m") == (number, number)
        ledger.close()
    assert size[200_000] - size[10_000] < 3e6  # a table in memory takes 5 MB, a dict 25


def test_seen_is_a_set():
    rng = random.Random(0)
    keys = [rng.choice(["p", "q\u2028", "é"]) + str(rng.randrange(3000)) for _ in range(3000)]
    seen = jsonl.Seen(iter(keys))
    assert len(seen) == len(set(keys))
    assert all((key in seen) == (key in set(keys)) for key in (f"{a}{n}" for a in ("p", "q\u2028", "é", "") for n in range(3001)))
    assert "" not in jsonl.Seen()


def test_second_model_pays_only_for_pairs_that_are_new(run):
    drawn, choose = [], load_script(COMPARISON).choose_pairs
    for model, seed in (("e5", 0), ("bge", 1)):
        drawn.append({pair for query, top in retrieve(seed, model).items() for pair in choose(query, top, 10, 42)})
    new = len(drawn[1] - drawn[0])
    assert 60 < new < 120 == len(drawn[1])
    with LLMServer(reply=lambda body: "1") as server:
        run(server, COMPARISON)
        assert asked(server).total() == 120
        run(server, COMPARISON, "--model", "bge")
        assert asked(server).total() == new
    assert len(rows(paths.preferences("bge", "tiny"))) == 120


def test_both_stages_may_share_a_ledger(lab, run, monkeypatch):
    retrieve()
    monkeypatch.chdir(lab)
    with LLMServer() as server:
        for least, most in ((168, 200), (0, 0)):
            run(server, SYNTHESIS, "--ledger", "all.jsonl")
            run(server, COMPARISON, "--ledger", lab / "all.jsonl")
            assert least <= asked(server).total() <= most
            paths.synthetic("tiny").unlink()
            paths.preferences("e5", "tiny").unlink()
    assert {row["step"] for row in rows(lab / "all.jsonl")} == set(STEPS.values())
    assert not paths.synthesis_ledger("tiny").exists()


def test_second_process_on_a_ledger_leaves_at_once_and_names_the_first(lab, run, monkeypatch):
    retrieve()
    monkeypatch.chdir(lab)
    with LLMServer(latency=20) as server:
        command = [sys.executable, ROOT / SYNTHESIS, "tiny", "--llm", "judge", "--base-url", server.url, "--ledger"]
        with subprocess.Popen([*command, "all.jsonl"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
            try:
                end = time.monotonic() + 50
                while not server.requests and time.monotonic() < end:
                    time.sleep(0.01)
                started = time.monotonic()
                assert f"process {first.pid};" in run(server, COMPARISON, "--ledger", lab / "all.jsonl", code=2)
                assert time.monotonic() - started < 2
            finally:
                first.kill()
    assert len(server.requests) == 1


def test_disk_that_fails_at_sync_is_no_traceback(run, monkeypatch):
    errors = [OSError(28, "No space left on device")]

    def broken(self):
        if errors:
            raise errors.pop()

    monkeypatch.setattr(jsonl.Appender, "SYNC_SECONDS", -1)
    monkeypatch.setattr(jsonl.Appender, "sync", broken)
    with LLMServer() as server:
        assert "No space left" in run(server, SYNTHESIS, code=1)


# --- replay


def fickle(body):
    """Verdicts that need a second question, or have none after it; replies that are cut off or refused."""
    digit, again = int(re.search(r"(?:topic|Number) \d?(\d)", prompt_of(body))[1]), "exactly one word" in prompt_of(body)
    if step_of(body) in ("verify", "compare"):
        pair = [int(number) for number in re.findall(r"Number (\d+)", prompt_of(body))]
        good = "yes" if len(pair) < 2 else "tie" if sum(pair) % 5 == 0 else "1" if pair[0] < pair[1] else "2"
        return "perhaps" if digit == 1 or (digit == 2 and not again) else good
    wrong = {5: {"content": "cut", "finish_reason": "length"}, 6: {"content": None, "refusal": "No."}}
    return wrong.get(digit, default_reply(body)) if step_of(body) == "positive" else default_reply(body)


@pytest.mark.parametrize("script", [SYNTHESIS, COMPARISON])
def test_replay_of_a_ledger_gives_the_rows_of_the_live_run(lab, run, script):
    retrieve()
    output = paths.synthetic("tiny") if script == SYNTHESIS else paths.preferences("e5", "tiny")
    ledger, given = lab / "kept.jsonl", ["--max-failure-rate", 1, *(["--both-orders"] if script == COMPARISON else [])]
    with LLMServer(reply=fickle) as server:
        run(server, script, "--ledger", ledger, *given)
    content, live = ledger.read_bytes(), [unordered(path) for path in (output, paths.failed(output))]
    assert {row["attempts"] for row in rows(paths.failed(output)) if row["reason"] == "unparsable"} == {2}
    assert min(map(len, live)) > 2
    output.unlink()
    run(None, script, "--ledger", ledger, *given)
    assert [unordered(path) for path in (output, paths.failed(output))] == live
    assert ledger.read_bytes() == content

    kept = [row for row in rows(ledger) if "03" not in "".join(row["item"])]
    write_jsonl(ledger, [*kept, {**kept[0], "model": "another"}])
    output.unlink()
    assert "--llm replay:another" in run(None, script, "--ledger", ledger, *given, code=2)
    assert "no reply of nobody" in run(None, script, "--ledger", ledger, "--llm", "replay:nobody", *given, code=2)
    assert "name the ledger" in run(None, script, "--llm", "replay:judge", code=2)
    said = run(None, script, "--ledger", ledger, "--llm", "replay:judge", *given)
    left = [unordered(path) for path in (output, paths.failed(output))]
    lost = sum(map(len, live)) - sum(map(len, left))
    assert f"{lost} {'queries' if script == SYNTHESIS else 'pairs'} have no recorded" in said
    assert lost > 0
    assert all(set(now) < set(then) or now == then for now, then in zip(left, live, strict=True))


def test_prompt_in_flight_is_not_sent_twice():
    with LLMServer(latency=0.05) as server:
        replies = ask(server, [ONE, replace(ONE, item=("another passage of the same text",)), ONE])
    assert len(server.requests) == 1
    assert len(set(replies)) == 1


# --- cost

BAD_PRICES = ["{", "[]", "{}", '"\xe9', '{"models": {"judge": [1, 2]}}', '{"date": "", "models": {"judge": 5}}']
BAD_PRICES += ['{"date": "", "models": {"judge": ["1", 2]}}', '{"date": "", "models": {"judge": [1, 2, 3]}}']


@pytest.mark.parametrize("content", BAD_PRICES)
def test_malformed_prices_are_bad_input(lab, content):
    cost.PRICES.write_text(content, "latin-1")
    with pytest.raises(BadInput, match=r"prices\.json: expected"):
        cost.price_of("judge", batch=True)


def test_price_and_meter_by_hand(lab):
    assert cost.price_of("another") is None
    price = cost.price_of("judge", batch=True)
    assert (price.prompt, price.completion, price.date) == (0.0005, 0.001, "2026-01")
    meter = cost.Meter(cost.price_of("judge"))
    meter.add("cot", Reply("", "", "stop", 10, 20))
    meter.add("cot", Reply("", "refusal", "stop", 1, 2))
    meter.add("verify", Reply("yes", "", "stop", 100, 1))
    cot = {"requests": 2, "prompt_tokens": 11, "completion_tokens": 22}
    verify = {"requests": 1, "prompt_tokens": 100, "completion_tokens": 1}
    assert meter.results() == {"usage": {"cot": cot, "verify": verify}, "cost_usd": 0.157, "prices_of": "2026-01"}
    assert [line.split() for line in meter.table().split("\n")[1:]] == [
        ["cot", "2", "11", "22", "0.0550"],
        ["verify", "1", "100", "1", "0.1020"],
        ["total", "3", "111", "23", "0.1570"],
    ]


@pytest.mark.parametrize("concurrency", [1, 64])
def test_max_cost_is_a_budget_over_all_runs_and_never_exceeded(run, concurrency):
    given, spent = ["--concurrency", concurrency, "--max-tokens", 60], 0.0
    with LLMServer(latency=0.01) as server:
        for budget in (1.5, 1.5, 3.0):
            assert f"stopped at --max-cost {budget:g}" in run(server, SYNTHESIS, *given, "--max-cost", budget, code=1)
            paid = [(len(prompt_of(body).split()), len(default_reply(body).split())) for body in server.requests]
            spent = sum(prompt + 2 * completion for prompt, completion in paid) / 1000
            assert budget - 0.8 < spent <= budget
        assert rows(paths.synthesis_ledger("tiny"))
        run(server, SYNTHESIS, *given, "--max-cost", 100)
        assert asked(server).total() == 48


def test_budget_that_runs_out_in_flight_stops_all_and_is_hard():
    class Slow:
        model, live, concurrency, paid, broken = "judge", True, 64, 0, False

        async def answer(self, request):
            await asyncio.sleep(random.random() / 50)
            self.paid += 1
            if self.broken:
                raise OSError
            return Reply("text", "", "stop", 300, 10)

    async def ask_all(teacher, budget):
        asker = asking.Asker(teacher, None, cost.Meter(cost.Price(1.0, 1.0, ""), max_cost=budget))
        async with asyncio.timeout(10):
            return await asyncio.gather(*map(asker.ask, requests), return_exceptions=True)

    requests = numbered(replace(ONE, prompt="a " * 300, max_tokens=10), 100)  # a token has two bytes: no room for a guess
    for budget, paid in ((309, 0), (10 * 310 - 1, 8), (1e6, 100)):
        teacher = Slow()
        replies = asyncio.run(ask_all(teacher, budget))
        assert paid <= teacher.paid <= budget / 310
        assert sum(isinstance(reply, cost.LimitReached) for reply in replies) == 100 - teacher.paid
    teacher.broken = True  # what fails gives back what it reserved
    assert {type(reply) for reply in asyncio.run(ask_all(teacher, 1e4))} == {OSError}


def test_max_cost_needs_a_price(run):
    with LLMServer() as server:
        assert "lists no price for gpt-x" in run(server, SYNTHESIS, "--llm", "gpt-x", "--max-cost", 1, code=2)
    assert "runs here and costs nothing" in run(None, SYNTHESIS, "--llm", "smollm2", "--max-cost", 1, code=2)
    assert not server.requests


def estimated(said):
    """{step: [requests, prompt tokens, completion tokens]} of the table that was printed."""
    found = re.findall(r"^ +(\w+) +([\d,]+) +([\d,]+) +([\d,]+) +[\d.?]+$", said, re.M)
    return {step: [int(number.replace(",", "")) for number in numbers] for step, *numbers in found}


def test_estimate_is_what_would_be_asked(lab, run, monkeypatch):
    prompts, queries = load_script(SYNTHESIS).PROMPTS, [f"Which is topic {n:02}?" for n in range(12)]
    monkeypatch.setattr(cost, "token_counter", lambda model: (lambda text: len(text.split()), "words"))

    def words(step, query, positive=""):
        return len(prompts[step].replace("{query}", query).replace("{positive}", positive).split())

    with LLMServer() as server:
        whole = estimated(run(server, SYNTHESIS, "--dry-run"))
        for step in ("cot", "positive", "negative", "verify"):
            given = {"positive": "word " * 400, "most": 32} if step == "verify" else {"positive": "", "most": 400}
            assert whole.pop(step) == [12, sum(words(step, query, given["positive"]) for query in queries), 12 * given["most"]]
        assert [whole["total"][0], whole["total"][2]] == [48, 12 * 1232]
        said = run(server, SYNTHESIS, "--dry-run", "--max-cost", 10)
        assert "replies as long as allowed; words; prices of 2026-01" in said
        assert "may go beyond --max-cost" in said
        run(server, SYNTHESIS, "--limit", 10)
        usage = json.loads(paths.run_json(paths.synthetic("tiny")).read_text())["results"]
        kept = rows(paths.synthesis_ledger("tiny"))
        paths.synthetic("tiny").unlink()  # so that only the ledger tells
        said = run(server, SYNTHESIS, "--dry-run")
        left = estimated(said)
        assert "nothing to ask" in run(server, SYNTHESIS, "--dry-run", "--limit", 10)
    for step in ("cot", "positive", "negative", "verify"):
        of_step = [row for row in kept if row["step"] == step]
        mean = sum(row["completion_tokens"] for row in of_step) / 10
        assert left[step][0] == 2
        assert abs(left[step][2] - 2 * mean) <= 1
        used = {name: sum(row[name] for row in of_step) for name in ("prompt_tokens", "completion_tokens")}
        assert usage["usage"][step] == {"requests": 10, **used}
    assert "replies as long as those in the ledger" in said
    spent = sum(row["prompt_tokens"] + 2 * row["completion_tokens"] for row in kept) / 1000
    assert usage["cost_usd"] == pytest.approx(spent)
    assert "may go beyond" in run(server, SYNTHESIS, "--dry-run", "--max-cost", spent + 0.001)
    assert "may go beyond" not in run(server, SYNTHESIS, "--dry-run", "--max-cost", 2 * spent)


def listing(folder):
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("more", [[], ["--batch"]])
@pytest.mark.parametrize("script", [SYNTHESIS, COMPARISON])
def test_the_price_of_an_api_is_known_without_its_key(lab, run_script, monkeypatch, script, more):
    retrieve()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given = [script, "tiny", "--llm", "judge", *(["--model", "e5"] if script == COMPARISON else []), *more]
    code, out, err = run_script(*given, "--dry-run")
    assert (code, "prices of" in out) == (0, True), err
    code, out, err = run_script(*given)
    assert (code, "OPENAI_API_KEY is not set" in err) == (2, True), err


@pytest.mark.parametrize("script", [SYNTHESIS, COMPARISON])
def test_dry_run_writes_and_sends_nothing(lab, run, script):
    retrieve()
    output = paths.synthetic("tiny") if script == SYNTHESIS else paths.preferences("e5", "tiny")
    ledger = paths.synthesis_ledger("tiny") if script == SYNTHESIS else paths.comparison_ledger("tiny")
    with LLMServer(reply=fickle) as server:

        def dry(*options, code=0):
            before = listing(lab.parent)
            said = run(server, script, "--dry-run", *options, code=code)
            assert listing(lab.parent) == before
            assert not server.requests
            return said

        assert dry() == dry("--force")
        run(server, script, "--limit", 6, "--max-failure-rate", 1)
        server.requests.clear()
        first = dry()
        with output.open("ab") as file, ledger.open("ab") as replies:  # as a run leaves them that is killed, or at work
            file.write(b'{"query_id": "q-')
            replies.write(b'{"key": "00')
        assert dry() == first
        changed = ["--seed", 7] if script == COMPARISON else ["--prompts", lab / "datasets/prompts.json"]
        (lab / "datasets/prompts.json").write_text('{"cot": "Search for {query}!"}')
        assert "--force starts anew" in (said := dry(*changed))  # what an edit would cost
        assert said == dry(*changed, "--force")
        assert "not paid again" in run(server, script, *changed, code=2)
        assert "recorded answers cost nothing" in dry("--llm", "replay", "--ledger", ledger, "--force")


# --- tokenizers


def test_tokens_are_counted_by_the_models_own_tokenizer_where_it_is_at_hand(monkeypatch):
    import tiktoken
    import transformers

    def encoding(model):
        assert model == "gpt-4o"
        return SimpleNamespace(name="o200k", encode=lambda text, disallowed_special: list(text))

    def pretrained(name, local_files_only):
        if name != "org/model" or not local_files_only:
            raise OSError
        return lambda text: {"input_ids": text.split()}

    monkeypatch.setattr(tiktoken, "encoding_for_model", encoding)
    count, name = cost.token_counter("gpt-4o")
    assert (count("four"), name) == (4, "tiktoken o200k")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", pretrained)
    for error in (KeyError, OSError, ValueError):  # no model of OpenAI, no network, a page that asks to log in
        monkeypatch.setattr(tiktoken, "encoding_for_model", lambda model, error=error: (_ for _ in ()).throw(error()))
        count, name = cost.token_counter("org/model")
        assert (count("one two three"), name) == (3, "the tokenizer of org/model")
        for model in ("gpt-4o", "org/other"):
            count, name = cost.token_counter(model)
            assert (count("x" * 41), name[:18]) == (11, "four bytes a token")


# --- pace

DURATIONS = {"6m0s": 360, "120ms": 0.12, "1h2m3.5s": 3723.5, "12": 12, "0.5": 0.5, "1m59.56s": 119.56}
DURATIONS |= {"garbage": None, "": None, None: None, "inf": None, "nan": None, "2026-01-01T00:00:00Z": None}


def test_durations():
    assert {text: _seconds(text) for text in DURATIONS} == DURATIONS


def limits(kind, *values):
    return {
        f"x-ratelimit-{name}-{kind}": str(value) for name, value in zip(("limit", "remaining", "reset"), values, strict=False)
    }


def gap(*headers):
    """Seconds between requests of 64 workers and 1000 tokens, after such headers."""
    pace = Pace(64)
    pace.heard({name: value for given in headers for name, value in limits(*given).items()}, 1000)
    found = pace._gap
    pace.heard({}, 1000)
    assert pace._gap == 0
    return pytest.approx(found, rel=0.01)


def test_requests_are_spaced_when_a_limit_comes_near():
    assert gap() == gap(("requests", 500, 400, "12s")) == 0  # plenty is left
    assert gap(("requests", 600, 60, "54s")) == 0.1  # OpenAI: what was used comes back evenly until the reset
    assert gap(("requests", 500, 400, "12s"), ("tokens", 60_000, 6_000, "54s")) == 1
    assert gap(("requests", 600, 10, "59s"), ("tokens", 30_000, 15_000, "30s")) == 2  # the nearer of two limits
    assert gap(("requests", 14_400, 14_370, "2m59.56s")) == 0  # Groq: requests of a day
    assert gap(("requests", 14_400, 50, "23h55m")) == 6
    assert gap(("requests", 100, 60, "6s")) == 0.1  # a window: all come back at once
    assert gap(("requests", 1200, 19)) == gap(("requests", 1200)) == 0.05
    assert gap(("requests", 60, 0, "60s")) == gap(("requests", 60, 0, "inf")) == 1
    assert gap(("requests", 0, 0, "0s"), ("tokens", -1, -1, "1s")) == 0  # unlimited
    assert gap(("requests", "many", "few", "soon"), ("tokens", "inf", "nan", "inf")) == 0
    assert gap(("requests", 60, 0, 1_800_000_000)) == 60  # the time of day in place of a duration


def test_announced_limit_is_kept_and_used():
    with LLMServer() as server:
        ask(server, [ONE])  # the client's imports are no part of what is measured
    with LLMServer(rpm=2400) as server:
        started = time.monotonic()
        assert not any(reply.reason for reply in ask(server, numbered(ONE, 140), concurrency=64))
        seconds = time.monotonic() - started
    assert len(server.requests) - 140 <= 3
    assert 140 / seconds * 60 > 0.8 * 2400


# --- servers that take less


class Picky(LLMServer):
    refuse = change = staticmethod(lambda body: None)

    def _problem(self, body):
        return self.refuse(body) or super()._problem(body)

    def _chat(self, body, refused):
        *rest, answer = super()._chat(body, refused)
        if answer.status == 200:
            self.change(answer.body)
        return *rest, answer


def refuses(*names, status=400):
    """What OpenAI says of a setting that a model lacks (400), and FastAPI of one that is not in its schema (422)."""

    def refuse(body):
        for name in names:
            if name in body and status == 400:
                return failure(400, f"Unsupported parameter: '{name}' is not supported with this model.", "unsupported_parameter")
            if name in body:
                detail = {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
                return Answer(422, {"detail": [detail]})

    return refuse


SETTINGS = {"max_tokens": "max_completion_tokens instead", "max_completion_tokens": "max_tokens instead"}
SETTINGS |= {"temperature": "takes no temperature", "response_format": "takes no JSON schema"}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("name", SETTINGS)
def test_refused_setting_is_done_without_after_one_line(capsys, name, status):
    start = {"_limit_name": name} if name.startswith("max") else {}
    with Picky(reply=lambda body: "1" if "Better" in prompt_of(body) else "text") as server:
        server.refuse = refuses(name, status=status)
        replies = ask(server, [*numbered(ONE, 20), *numbered(VERDICT, 20)], attempts=1, **start)
    assert Counter(reply.text for reply in replies) == {"text": 20, "1": 20}
    (note,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("note:")]
    assert SETTINGS[name] in note
    assert sum(name in body for body in server.requests) <= (1 if name != "response_format" else 8)


@pytest.mark.parametrize("usage", [None, {}])
def test_missing_usage_is_estimated_after_one_line(capsys, usage):
    with Picky(reply=lambda body: "x" * 40) as server:
        server.change = lambda body: body.update(usage=usage)
        replies = ask(server, numbered(replace(ONE, prompt="Why?" * 9), 20))
    assert {(reply.prompt_tokens, reply.completion_tokens) for reply in replies} == {(9, 10)}
    assert capsys.readouterr().out.count("reports no usage") == 1


LARGE = "max_tokens is too large: 400. This model supports at most 300 completion tokens, whereas you provided 400."


@pytest.mark.parametrize(("refuse", "most"), [(lambda body: failure(400, LARGE, "bad"), 1), (refuses(*list(SETTINGS)[:2]), 2)])
def test_other_refusals_end_in_a_failure_and_no_loop(capsys, refuse, most):
    with Picky() as server:
        server.refuse = lambda body: refuse(body) if prompt_of(body) != ONE.prompt else None
        reply = ask(server, [ONE, *numbered(ONE, 1)])[1]
    assert (reply.reason, reply.finish_reason) == ("bad_request", "error")
    assert "max_" in reply.message
    assert len(server.requests) == 1 + most
    assert capsys.readouterr().out.count("note:") == 0


def test_server_that_is_down_for_a_day_puts_no_worker_to_sleep_for_it(monkeypatch):
    slept, sleep = [], asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: slept.append(seconds) or sleep(0))
    with Picky() as server:
        ask(server, [ONE])
        server.refuse = lambda body: Answer(503, {}, {"retry-after": "86400"}) if prompt_of(body) != ONE.prompt else None
        assert ask(server, [ONE, *numbered(ONE, 1)])[1] == Reply(reason="http_503", attempts=2)
    assert max(slept) == 60


# --- the judge's report


def brute(made, gold):
    """Counts of the report by plain loops."""
    decided = [row for row in made if "reason" not in row]
    judged = [row for row in made if row.get("reason", "tie") in ("tie", "disagreement")]
    said = Counter(itertools.chain.from_iterable(row["verdicts"] for row in judged))
    edges = {(row["query_id"], row["preferred_id"], row["rejected_id"]) for row in decided}
    queries, ids, triples = {edge[0] for edge in edges}, sorted({i for edge in edges for i in edge[1:]}), []
    for query, triple in itertools.product(queries, itertools.combinations(ids, 3)):
        wins = Counter(x for x, y in itertools.permutations(triple, 2) if (query, x, y) in edges)
        triples += [(query, len(wins) == 3)] if wins.total() == 3 else []
    one, other = ([gold[row["query_id"]].get(row[name], 0) > 0 for row in decided] for name in ("preferred_id", "rejected_id"))
    return {
        "tie": (sum(row.get("reason") == "tie" for row in made), len(judged)),
        "flip": (sum(row.get("reason") == "disagreement" for row in judged), sum(len(row["verdicts"]) == 2 for row in judged)),
        "first_shown": (said["1"], said["1"] + said["2"]),
        "cycle": (sum(around for _, around in triples), len(triples)),
        "queries_with_a_cycle": (len({query for query, around in triples if around}), len(queries)),
        "gold": (sum(a > b for a, b in zip(one, other, strict=True)), sum(a != b for a, b in zip(one, other, strict=True))),
    }


@pytest.mark.parametrize("seed", range(5))
def test_report_equals_plain_loops(seed):
    rng, made = random.Random(seed), []
    gold = {f"q{n}": {f"p{i}": rng.randrange(3) for i in rng.sample(range(6), 3)} for n in range(20)}
    for query, (first, second) in itertools.product(gold, itertools.combinations([f"p{i}" for i in range(6)], 2)):
        shown, kind = rng.sample([first, second], 2), rng.random()
        row = {"query_id": query, "shown": shown, "verdicts": rng.choices(("1", "2", "tie"), k=rng.choice((1, 2)))}
        if kind < 0.7:
            made.append({**row, "preferred_id": shown[0], "rejected_id": shown[1]})
        elif kind < 0.9:
            reason = rng.choice(["tie", "disagreement", "unparsable", "http_500"])
            row["verdicts"] = ["1", "2"] if reason == "disagreement" else row["verdicts"]
            made.append({**row, "reason": reason})
    found = judge.report(iter(made), gold)
    expected = brute(made, gold)
    assert {name: (found[name]["count"], found[name]["of"]) for name in expected} == expected
    assert expected["cycle"][0] > 0 < expected["queries_with_a_cycle"][0]
    assert found["outcomes"] == Counter(row.get("reason", "decided") for row in made)


def test_wilson_interval_by_hand():
    # (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n) with p = 0.8, n = 10, z² = 3.8416: (0.99208 ± 0.31351) / 1.38416
    assert judge.share(8, 10) == {"count": 8, "of": 10, "share": 0.8, "interval": [0.4902, 0.9433]}
    assert judge.share(0, 10)["interval"] == [0.0, 0.2775]
    assert judge.share(10, 10)["interval"] == [0.7225, 1.0]
    assert judge.share(0, 0) == {"count": 0, "of": 0, "share": None, "interval": None}
    assert "-" not in json.dumps([judge.share(0, n)["interval"] for n in range(1, 500)])


def picture(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size, len(image.convert("L").getcolors())


def test_report_of_nothing_is_empty(tmp_path):
    found = judge.report([], {})
    assert found["outcomes"] == {}
    assert all(found[name]["share"] is None for name in judge.LABELS)
    assert judge.lines(found) == []
    judge.draw(found, tmp_path / "report.png", "nothing")
    assert picture(tmp_path / "report.png")[0][0] > 500


def test_every_comparison_leaves_a_report_and_a_judge_of_positions_is_seen(run):
    retrieve()
    output = paths.preferences("e5", "tiny")
    with LLMServer(reply=lambda body: "1") as server:
        said = run(server, COMPARISON, "--both-orders")
        assert rows(output) == []
        found = json.loads(paths.report(output, ".json").read_text())
        assert [(found[name]["count"], found[name]["of"]) for name in ("flip", "first_shown", "gold")] == [
            (120, 120),
            (240, 240),
            (0, 0),
        ]
        assert "passage shown first preferred: 100.0% of 240" in said
        for path in (paths.report(output, ".json"), paths.report(output, ".png")):
            path.unlink()
        run(server, COMPARISON, "--both-orders")
    assert json.loads(paths.report(output, ".json").read_text()) == found
    (width, height), colours = picture(paths.report(output, ".png"))
    assert width > 800 < 4 * height
    assert colours > 20


# --- load


def test_512_requests_are_in_flight(monkeypatch):
    async def wait(reader, seconds):
        """The first is answered at once, the others when all are there."""
        while seconds and server.in_flight_peak < 512 and time.monotonic() < end:
            await asyncio.sleep(0.3)

    monkeypatch.setattr(llm_server, "client_leaves", wait)
    end = time.monotonic() + 50
    with LLMServer(latency=lambda body: float(prompt_of(body) != ONE.prompt)) as server:
        replies = ask(server, [ONE, *numbered(ONE, 512)], concurrency=512)
    assert server.in_flight_peak == 512
    assert not any(reply.reason for reply in replies)
