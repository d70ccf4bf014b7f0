"""Both LLM stages with --batch: the real scripts and the real client against a server with a Batch API."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from conftest import ROOT, load_script
from llm_lab import COMPARISON, SYNTHESIS, asked, broken, prompt_of, replies, retrieve, rows, step_of, synthetic
from llm_server import LLMServer, failure, request_key

from syntriever.files import jsonl, paths
from syntriever.llm import batch_api, cost
from syntriever.llm.ledger import Ledger
from syntriever.run import lineage


class Mangling(LLMServer):
    """`mangle(rows)` makes the bytes of each result file."""

    mangle = None

    def _store(self, name, content):
        if name == "output.jsonl":
            content = self.mangle([json.loads(line) for line in content.splitlines()])
        return super()._store(name, content)


class Refusing(LLMServer):
    """`refuse(what)` is an Answer, or None, to what is no chat."""

    refuse = staticmethod(lambda what: None)

    def _other(self, what, headers, raw):
        return self.refuse(what) or super()._other(what, headers, raw)


def once(fault, step, about=""):
    """Batch fault of the first time that a step of such a query is in a batch."""
    fits, seen = broken(fault, step, about), set()
    return lambda custom_id, body: None if custom_id in seen else fits(body, 1) and (seen.add(custom_id) or fault)


def traffic(server):
    """How many chats, uploads and new batches the server got."""
    keys = Counter(row["key"] if " " in row["key"] else "chat" for row in server.rows if row["event"] == "received")
    lines = sum(len(server._lines[name]) for name, made in server.batches.items() if made["status"] != "failed")
    return keys["chat"] - lines, keys["POST /v1/files"], keys["POST /v1/batches"]


def each_once(server):
    return all(number == 1 for number in Counter(map(request_key, server.requests)).values())


def left():
    """What only an unfinished run leaves."""
    return [path.name for path in paths.home().glob("*/*batch*")]


@pytest.fixture
def finish(lab, run_script):
    """finish(server, script, *options, code=0): run until nothing waits; (how many runs, what all said)."""

    def finish(server, script=SYNTHESIS, *options, code=0, llm="judge"):
        said = []
        for number in range(1, 12):
            given = ["tiny", *(["--model", "e5"] if script == COMPARISON else []), "--llm", llm, "--base-url", server.url]
            found, *printed = run_script(script, *given, "--batch", *options)
            said += printed
            if found != 75:
                assert found == code, printed
                return number, "".join(said)
        raise AssertionError("no end")

    return finish


# --- waves


def test_waves_end_in_the_rows_of_a_live_run(lab, run):
    def verdict(prompt):
        return "No." if "topic 04" in prompt else "perhaps" if "topic 05" in prompt else "Yes"

    with LLMServer(replies(verify=verdict)) as server:
        run(server, SYNTHESIS)
        live = synthetic()
        live_ledger, live_failed = rows(paths.synthesis_ledger("tiny")), rows(paths.failed(paths.synthetic("tiny")))
    for path in lab.glob("datasets/tiny_*"):
        path.unlink()
    with LLMServer(replies(verify=verdict)) as server:
        assert "35 requests are with the Batch API" in run(server, SYNTHESIS, "--batch", code=75)
        assert (asked(server), traffic(server)) == ({"cot": 12, "positive": 12, "negative": 12}, (1, 1, 1))
        assert (paths.synthetic("tiny").read_bytes(), len(left())) == (b"", 2)
        assert "run the same command again" in run(server, SYNTHESIS, "--batch", code=75)
        assert (asked(server), traffic(server)) == ({}, (1, 1, 1))
        run(server, SYNTHESIS, "--batch", code=75)
        assert (asked(server), traffic(server)) == ({"verify": 12}, (2, 2, 2))
        run(server, SYNTHESIS, "--batch", code=75)
        said = run(server, SYNTHESIS, "--batch")
        assert (asked(server), traffic(server)) == ({"verify": 1}, (3, 2, 2))  # topic 05, once more and as the first of its run
    assert "python train_stage1.py e5 tiny" in said
    assert synthetic() == live
    assert rows(paths.failed(paths.synthetic("tiny"))) == live_failed
    assert not left()

    def facts(ledger):
        return sorted((row["key"], row["step"], row["model"], row["text"], row["reason"], row["max_tokens"]) for row in ledger)

    assert facts(rows(paths.synthesis_ledger("tiny"))) == facts(live_ledger)
    assert lineage.load_record(paths.synthetic("tiny"))["complete"]


def test_progress_and_the_end_of_a_running_batch(run_script, lab):
    with LLMServer(batch_polls=2) as server:
        given = [SYNTHESIS, "tiny", "--llm", "judge", "--base-url", server.url, "--batch"]
        said = [run_script(*given) for _ in range(4)]
        assert [code for code, *_ in said] == [75] * 4
        assert "batch_1: in_progress, 0 of 35 requests done" in said[1][1] == said[2][1]
        assert "batch_1: completed, 35 of 35 requests done\n       35 answered\n" in said[3][1]
        assert not lineage.load_record(paths.synthetic("tiny"))["complete"]


def test_comparison_is_as_live(run, finish):
    retrieve()
    output, given = paths.preferences("e5", "tiny"), ["--k", 3, "--both-orders", "--max-failure-rate", 1]
    with LLMServer() as server:
        run(server, COMPARISON, *given)
        live = [sorted(map(str, rows(path))) for path in (output, paths.failed(output))]
    for path in output.parent.glob("*preferences*"):
        path.unlink()
    with LLMServer(batch_polls=0) as server:
        assert finish(server, COMPARISON, *given)[0] == 2
        assert (traffic(server), asked(server)) == ((1, 1, 1), {"compare": 72})
    assert [sorted(map(str, rows(path))) for path in (output, paths.failed(output))] == live
    assert len(live[0]) > 5
    assert not left()


def test_what_is_out_in_a_batch_is_not_paid_for_live_as_well(run, finish):
    with LLMServer(batch_polls=0) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        assert "tiny_synthetic.batches.json: requests are out in batches" in run(server, SYNTHESIS, code=2)
        run(server, SYNTHESIS, "--dry-run")
        finish(server)
        run(server, SYNTHESIS)  # nothing is out, and nothing is left to ask
        assert each_once(server)
    assert len(synthetic()) == 12


def test_state_unknown_to_us_is_waited_for(run):
    with LLMServer() as server:
        run(server, SYNTHESIS, "--batch", code=75)
        server.batches["batch_1"]["status"] = "queued"
        assert "1 of the batches still run" in run(server, SYNTHESIS, "--batch", code=75)
        assert traffic(server) == (1, 1, 1)


def test_files_are_split_at_both_limits(run, finish, monkeypatch):
    for name, limit in (("MAX_REQUESTS", 10), ("MAX_BYTES", 9_000)):
        with LLMServer(batch_polls=0) as server, monkeypatch.context() as patch:
            patch.setattr(batch_api, name, limit)
            run(server, SYNTHESIS, "--batch", "--force", "--max-tokens", limit, code=75)
            sent = list(server._files.values())
            assert sum(content.count(b"\n") for content in sent) == 35
            sizes = [content.count(b"\n") if name == "MAX_REQUESTS" else len(content) for content in sent]
            assert len(sizes) >= 3
            assert max(sizes) <= limit < min(sizes[:-1]) + (1 if name == "MAX_REQUESTS" else 1000)
            finish(server, SYNTHESIS, "--max-tokens", limit)
            assert each_once(server)
        assert len(synthetic()) == 12
        for path in (paths.synthetic("tiny"), paths.synthesis_ledger("tiny")):
            path.unlink()


@pytest.mark.parametrize("concurrency", [1, 64])
def test_queries_of_one_text_are_one_request(finish, monkeypatch, concurrency):
    monkeypatch.setattr(batch_api.BatchTeacher, "concurrency", concurrency)
    queries = paths.queries("tiny")
    queries.write_text(queries.read_text("utf-8").replace("topic 06", "topic 05"), "utf-8")
    with LLMServer(batch_polls=0) as server:
        finish(server)
        assert (asked(server).total(), traffic(server)) == (44, (2, 2, 2))
    assert len(synthetic()) == 12
    assert len(rows(paths.synthesis_ledger("tiny"))) == 44


# --- the first request


@pytest.mark.parametrize(("script", "named"), [({"api_key": "another"}, "the key"), ({"models": ["another"]}, "no such model")])
def test_wrong_key_or_model_costs_one_request_and_uploads_nothing(run, script, named):
    with LLMServer(**script) as server:
        assert named in run(server, SYNTHESIS, "--batch", code=2)
        assert (traffic(server), len(server.requests), left()) == ((1, 0, 0), 1, [])


# --- results


@pytest.mark.parametrize("fault", ["expired", "missing", "429", "500"])
def test_what_did_not_come_back_is_asked_again_and_nothing_else(finish, fault):
    with LLMServer(batch_polls=0, batch_fault=once(fault, "cot", "topic 0")) as server:
        runs, said = finish(server)
        lost = 10 - ("topic 0" in prompt_of(server.requests[0]))
        assert asked(server) == {"cot": 12 + lost, "positive": 12, "negative": 12, "verify": 12}
        assert f"{35 - lost} answered, {lost} " in said
        assert said.count("to ask again") == 1
    assert len(synthetic()) == 12
    assert len(rows(paths.synthesis_ledger("tiny"))) == 48
    assert not paths.failed(paths.synthetic("tiny")).exists()


def test_quota_used_up_in_a_batch_ends_the_run_and_keeps_the_rest(run, finish):
    with LLMServer(batch_polls=0, batch_fault=once("insufficient_quota", "negative", "topic 05")) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        assert "quota" in run(server, SYNTHESIS, "--batch", code=1)
        assert len(rows(paths.synthesis_ledger("tiny"))) == 35
        asked(server)
        finish(server)
        assert asked(server) == {"negative": 1, "verify": 12}
    assert len(synthetic()) == 12


def test_model_withdrawn_while_a_batch_runs(run, finish):
    with LLMServer(batch_polls=0) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        server.models = ["another"]
        assert "no such model" in run(server, SYNTHESIS, "--batch", code=2)
        assert traffic(server) == (1, 1, 1)  # the batch has told; no live request is spent on it
        server.models = None
        finish(server)
    assert len(synthetic()) == len(rows(paths.synthesis_ledger("tiny"))) / 4 == 12


TYPED = {name: name for name in ("empty", "length", "content_filter", "refusal")} | {"null": "empty", "context": "context_length"}


@pytest.mark.parametrize(("fault", "reason"), TYPED.items())
def test_unusable_replies_have_a_reason_and_are_asked_again_only_on_demand(finish, fault, reason):
    query = "topic 05"
    fits = broken(fault, "positive", query)
    with LLMServer(batch_polls=0, batch_fault=lambda custom_id, body: fits(body, 1)) as server:
        _, said = finish(server)
        assert f"34 answered, 1 {reason}\n" in said
        assert asked(server) == {"cot": 12, "positive": 12, "negative": 12, "verify": 11}
        (failed,) = rows(paths.failed(paths.synthetic("tiny")))
        assert [failed[name] for name in ("query_id", "step", "reason", "attempts")] == ["q-p05", "positive", reason, 1]
        finish(server)
        assert not server.requests
        finish(server, SYNTHESIS, "--retry-failed")  # live: it is the first of its run
        assert asked(server) == {"positive": 1, "verify": 1}
    assert len(synthetic()) == 12


def test_batch_may_have_an_error_file_only(finish):
    with LLMServer(batch_polls=0, batch_fault=lambda custom_id, body: "context") as server:
        assert "2 of 2 requests done\n       2 context_length\n" in finish(server, SYNTHESIS, "--limit", 1, code=1)[1]
        assert server.batches["batch_1"]["output_file_id"] is None
        assert asked(server).total() == 3
    assert [row["reason"] for row in rows(paths.failed(paths.synthetic("tiny")))] == ["context_length"]


def test_retry_failed_ends_where_replies_stay_unusable(finish):
    doubt = replies(verify=lambda prompt: "perhaps" if "topic 0" in prompt else "yes")
    given = ["--max-failure-rate", 1]
    with LLMServer(doubt, batch_polls=0) as server:
        finish(server, SYNTHESIS, *given)
        asked(server)
        failed = rows(paths.failed(paths.synthetic("tiny")))
        runs, _ = finish(server, SYNTHESIS, *given, "--retry-failed")
        assert runs <= 3
        assert (asked(server), len(failed)) == ({"verify": 10 + 1}, 10)  # the live one got its reminder, too
        server.reply = replies(verify="yes")
        finish(server, SYNTHESIS, *given, "--retry-failed")
        assert asked(server) == {"verify": 10}
    assert len(synthetic()) == 12


def test_lines_that_fit_nothing_are_counted_and_harm_nothing(run, finish):
    def mangle(made):
        lines = [json.dumps(row).encode() for row in made]
        half = lines[0].replace(b'"content": "', b'"content": "\\ud83d ', 1)
        wrong = {**made[1], "response": {"status_code": 200, "body": {**made[1]["response"]["body"], "choices": []}}}
        strange = [b"\xff", b"{", b"5", b"[]", b"", b'{"custom_id": 5}', json.dumps({**made[3], "custom_id": "cot-00"}).encode()]
        shapes = [{**made[4], "response": "text"}, {**made[5], "response": {"status_code": "?", "body": ["text"]}}]
        return b"\n".join([half, half, json.dumps(wrong).encode(), *map(str.encode, map(json.dumps, shapes)), *strange, *lines])

    server = Mangling(batch_polls=0)
    server.mangle = lambda made: mangle(made) if len(made) > 30 else b"".join(json.dumps(row).encode() + b"\n" for row in made)
    with server:
        run(server, SYNTHESIS, "--batch", code=75)
        _, said = finish(server)
        # 2 times of line 0, once each of lines 1, 4, 5, six strange lines.
        assert "32 answered, 11 unreadable, of unknown id, or a second time, 3 to ask again" in said
        assert asked(server).total() == 48 + 3
    assert len(synthetic()) == 12
    keys = [row["key"] for row in rows(paths.synthesis_ledger("tiny"))]
    assert len(keys) == len(set(keys)) == 48


def test_schema_refused_in_a_batch_is_done_without(finish):
    class Plain(LLMServer):
        def _problem(self, body):
            wrong = "response_format" in body and failure(400, "Invalid parameter: 'response_format' of this type.", None)
            return wrong or super()._problem(body)

    def missing(custom_id, body):  # so that in the second wave the live request is no verdict
        about = re.search(r"topic \d\d", prompt_of(server.requests[0]))[0]
        return broken("missing", "positive", about)(body, len(server.batches)) if len(server.batches) == 1 else None

    with Plain(batch_polls=0, batch_fault=missing) as server:
        _, said = finish(server)
        assert "takes no JSON schema" in said
        verdicts = [body for body in server.requests if step_of(body) == "verify"]
        refused = [body for body in verdicts if "response_format" in body]
        assert (len(refused), len(verdicts)) == (12, 24)
    assert len(synthetic()) == 12


# --- batches that fail


def test_batch_refused_in_validation(run, finish):
    with LLMServer(batch_polls=0) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        problem = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached."}
        server.batches["batch_1"] |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
        said = run(server, SYNTHESIS, "--batch", code=1)
        assert "batch_1 was refused: Enqueued token limit reached." in said
        asked(server)
        finish(server)
        assert asked(server).total() == 35 + 12
    assert len(synthetic()) == 12


def test_cancelled_batch_is_kept_as_far_as_it_came(run, finish):
    with LLMServer(batch_polls=0) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        server.batches["batch_1"]["status"] = "cancelling"
        _, said = finish(server)
        assert "batch_1: cancelled" in said
        assert "17 answered, 18 not in the results, to ask again" in said
        assert asked(server).total() == 48 + 18
    assert len(synthetic()) == 12


def test_server_without_batch_api(run):
    with Refusing() as server:
        server.refuse = lambda what: failure(404, f"Invalid URL ({what})", None)
        assert "has no Batch API" in run(server, SYNTHESIS, "--batch", code=1)
        assert "has no Batch API" in run(server, SYNTHESIS, "--batch", code=1)
        assert len(server.requests) == 1
        run(server, SYNTHESIS)
        assert each_once(server)
    assert len(synthetic()) == 12


@pytest.mark.parametrize(("what", "fault"), [("POST /v1/batches", "reset"), ("GET /v1/files/file-2/content", "truncated")])
def test_answers_of_the_server_that_are_lost(run, finish, what, fault):
    faults = [fault]
    with LLMServer(batch_polls=0, other_fault=lambda now: faults.pop() if faults and now == what else None) as server:
        if "batches" in what:
            assert "cannot be reached" in run(server, SYNTHESIS, "--batch", code=1)
            assert traffic(server) == (1, 1, 1)
        else:
            run(server, SYNTHESIS, "--batch", code=75)
            assert "cannot be reached" in run(server, SYNTHESIS, "--batch", code=1)
        finish(server)
        assert not faults
        assert (traffic(server), each_once(server)) == ((2, 2, 2), True)
    assert len(synthetic()) == 12
    assert not left()


# --- kills


def is_input(self, *_):
    return ".batch-" in self.path.name


# Where the process ends: in run 1 (submits two batches) or 2 (collects them); at which call; before it or after.
KILLS = {
    "spooling": (1, jsonl.Appender, "add", is_input, 7, "after"),
    "first file full": (1, jsonl.Appender, "close", is_input, 1, "after"),
    "all spooled": (1, batch_api.BatchTeacher, "_save", None, 1, "before"),
    "state saved": (1, batch_api.BatchTeacher, "_save", None, 1, "after"),
    "file uploaded": (1, batch_api.BatchTeacher, "_save", None, 2, "before"),
    "its id saved": (1, batch_api.BatchTeacher, "_save", None, 2, "after"),
    "batch created": (1, batch_api.BatchTeacher, "_save", None, 3, "before"),
    "one submitted": (1, batch_api.BatchTeacher, "_save", None, 3, "after"),
    "second created": (1, batch_api.BatchTeacher, "_save", None, 5, "before"),
    "results half taken": (2, Ledger, "add", None, 4, "after"),
    "results taken": (2, Ledger, "sync", None, 1, "after"),
    "state without it": (2, batch_api.BatchTeacher, "_save", None, 1, "after"),
    "second half taken": (2, Ledger, "add", None, 9, "before"),
    "all collected": (2, batch_api.BatchTeacher, "_save", None, 2, "after"),
}


@pytest.mark.parametrize("where", KILLS)
def test_kill_loses_nothing_and_submits_nothing_twice(run, run_script, finish, monkeypatch, where):
    number, owner, name, fits, nth, when = KILLS[where]
    monkeypatch.setattr(batch_api, "MAX_REQUESTS", 6)
    with LLMServer(batch_polls=0) as server:
        given = [SYNTHESIS, "tiny", "--llm", "judge", "--base-url", server.url, "--batch", "--limit", 4]
        for _ in range(1, number):
            assert run_script(*given)[0] == 75
        if not (child := os.fork()):
            signal.alarm(30)  # a fork beside the server's thread must not hang the tests
            original, calls = getattr(owner, name), itertools.count(1)

            def dying(self, *args):
                last = (not fits or fits(self)) and next(calls) == nth
                if last and when == "before":
                    os._exit(9)
                result = original(self, *args)
                if last:
                    os._exit(9)
                return result

            setattr(owner, name, dying)
            os._exit(run_script(*given)[0])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        finish(server, SYNTHESIS, "--limit", 4)
        assert len(server.requests) == 16
        assert each_once(server)
        assert all(made["status"] == "completed" for made in server.batches.values())
        done = synthetic()
    keys = [row["key"] for row in rows(paths.synthesis_ledger("tiny"))]
    assert len(keys) == len(set(keys)) == 16
    assert not left()
    for path in (paths.synthetic("tiny"), paths.synthesis_ledger("tiny")):
        path.unlink()
    with LLMServer() as server:
        run(server, SYNTHESIS, "--limit", 4)
    assert synthetic() == done


def test_kill_after_a_retry_of_failed_ones_keeps_their_new_replies(run, finish, monkeypatch):
    with LLMServer(batch_polls=0, batch_fault=once("refusal", "cot", "topic 0")) as server:
        finish(server, SYNTHESIS, "--max-failure-rate", 1)
        asked(server)
        run(server, SYNTHESIS, "--batch", "--retry-failed", code=75)
        with monkeypatch.context() as patch:
            add, calls = Ledger.add, itertools.count(1)

            def interrupted(self, *args):
                if next(calls) == 4:
                    raise KeyboardInterrupt
                add(self, *args)

            patch.setattr(Ledger, "add", interrupted)
            run(server, SYNTHESIS, "--batch", "--retry-failed", code=130)
        finish(server, SYNTHESIS, "--retry-failed")
        assert set(asked(server)) == {"cot", "verify"}
    keys = Counter(row["key"] for row in rows(paths.synthesis_ledger("tiny")) if not row["reason"])
    assert (len(keys), set(keys.values())) == (48, {1})
    assert len(synthetic()) == 12


# --- other settings, limits, state


def test_replies_to_prompts_and_models_of_before_are_kept(lab, run, finish):
    prompts = {"cot": load_script(SYNTHESIS).PROMPTS["cot"] + " Please."}
    (lab / "prompts.json").write_text(json.dumps(prompts))
    with LLMServer(batch_polls=0) as server:
        run(server, SYNTHESIS, "--batch", code=75)
        assert asked(server).total() == 36
        finish(server, SYNTHESIS, "--prompts", lab / "prompts.json", "--force")
        assert asked(server) == {"cot": 12, "verify": 12}
        paths.synthetic("tiny").unlink()
        finish(server)
        assert not server.requests
        run(server, SYNTHESIS, "--batch", "--max-tokens", 300, "--prompts", lab / "prompts.json", "--force")
        assert not server.requests
        (lab / "prompts.json").write_text(json.dumps({"cot": "Search query: {query}"}))
        run(server, SYNTHESIS, "--batch", "--prompts", lab / "prompts.json", "--force", code=75)
        finish(server, llm="other", code=2)  # refused without --force, and the batch stays
        finish(server, SYNTHESIS, "--force", llm="other")
    models = Counter((row["model"], row["step"]) for row in rows(paths.synthesis_ledger("tiny")))
    steps = {("other", step): 12 for step in ("cot", "positive", "negative", "verify")}
    assert models == steps | {("judge", "cot"): 36, ("judge", "positive"): 12, ("judge", "negative"): 12, ("judge", "verify"): 12}


def test_max_requests_holds_for_each_run(finish):
    with LLMServer(batch_polls=0) as server:
        finish(server, SYNTHESIS, "--max-requests", 20)
        sizes = [made["request_counts"]["total"] for made in server.batches.values()]
        assert sizes[0] == max(sizes) == 19
        assert sum(sizes) + len(sizes) in (48, 47)  # one live for each wave; the last may be live only
        assert each_once(server)
    assert len(synthetic()) == 12


def test_max_cost_is_kept_and_half_of_a_live_runs(lab, run, finish, monkeypatch):
    prices = {"date": "2026-01-01", "batch_factor": 0.5, "models": {"judge": [0, 1000]}}
    (lab / "prices.json").write_text(json.dumps(prices))
    monkeypatch.setattr(cost, "PRICES", lab / "prices.json")
    with LLMServer(batch_polls=0) as server:  # a reply of 400 tokens costs 0.2 in a batch, and is said to have 34
        run(server, SYNTHESIS, "--batch", "--max-cost", 2.1, code=75)
        assert asked(server).total() == 11
        runs, _ = finish(server, SYNTHESIS, "--max-cost", 0.1, code=1)
        assert (runs, asked(server).total()) == (1, 0)
        finish(server, SYNTHESIS, "--max-cost", 100)
        assert asked(server).total() == 37
    spent = sum(row["completion_tokens"] for row in rows(paths.synthesis_ledger("tiny"))) * 0.0005
    assert 0.3 < spent < 1


BAD_STATES = ["{", "[]", "null", '{"batches": 5}', '{"batches": [5]}', '{"batches": [{}]}', '{"batch": []}', "\\xff", ""]
BAD_STATES += ['{"batches": [{"number": "../1", "input_file_id": null, "id": null}]}']
BAD_STATES += ['{"batches": [{"number": 1, "input_file_id": 5, "id": []}]}']


@pytest.mark.parametrize("content", BAD_STATES)
def test_bad_state_is_refused_by_name(run, content):
    with LLMServer() as server:
        run(server, SYNTHESIS, "--batch", code=75)
        before, state = traffic(server), paths.batches(paths.synthetic("tiny"))
        state.write_bytes(content.encode().replace(b"\\xff", b"\xff"))
        assert "datasets/tiny_synthetic.batches.json: not the state" in run(server, SYNTHESIS, "--batch", code=2)
        (lost,) = paths.home().glob("*/*.batch-*.jsonl")
        assert (traffic(server), len(server.rows), lost.exists()) == (before, len(server.rows), True)


@pytest.mark.parametrize("refused", [None, "chat", "files"])
def test_key_is_written_nowhere(lab, refused):
    key = "sk-canary-2f6b1c"
    with Refusing(api_key="another" if refused == "chat" else key, batch_polls=0) as server:
        wrong = failure(401, f"Incorrect API key provided: {key}.", "invalid_api_key") if refused == "files" else None
        server.refuse = lambda what: wrong
        command = [
            sys.executable,
            ROOT / SYNTHESIS,
            "tiny",
            "--llm",
            "judge",
            "--base-url",
            server.url,
            "--limit",
            "2",
            "--batch",
        ]
        env = {**os.environ, "OPENAI_API_KEY": key, "OPENAI_LOG": "debug"}
        for code in [2] if refused else [75, 75, 0]:
            done = subprocess.run(command, env=env, capture_output=True, timeout=30)
            assert done.returncode == code, done.stderr
            written = [path.read_bytes() for path in lab.rglob("*") if path.is_file()]
            assert not any(key.encode() in content for content in [*written, done.stdout, done.stderr])
            assert bool(left()) is (code == 75 or refused == "files")
            assert b"DEBUG" in done.stderr or b"debug" in done.stderr.lower()


def test_second_process_is_refused_at_once(lab, run):
    with LLMServer(latency=30) as server, ExitStack() as stack:
        command = [sys.executable, ROOT / SYNTHESIS, "tiny", "--llm", "judge", "--base-url", server.url, "--batch"]
        first = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        stack.callback(first.kill)
        end = time.monotonic() + 20
        while not server.requests and time.monotonic() < end:
            time.sleep(0.02)
        started = time.monotonic()
        assert f"by process {first.pid}" in run(server, SYNTHESIS, "--batch", code=2)
        assert time.monotonic() - started < 2
        assert len(server.requests) == 1
