"""Each dialect of the table through live synthesis, --batch and comparison: what servers send, what becomes of it."""

import json
import random
import re
from collections import Counter

import pytest
from conftest import make_dataset, write_jsonl
from llm_dialects import AT_FIRST, ENDS, GOOD, PASSES, ROW, TEXT, Dialect
from llm_lab import COMPARISON, SYNTHESIS, asked, prompt_of, rows, step_of
from llm_server import Answer, LLMServer, default_reply, failure, said

from syntriever.files import paths

TABLE = {**{name: Dialect(sends) for name, sends in (GOOD | PASSES).items()}, **ROW}
NAMES = dict(enumerate(TABLE))
GIVEN = ["--llm", "judge", "--max-failure-rate", "1", "--base-url"]


def number_of(prompt):
    return int(re.search(r"topic (\d\d\d)", prompt)[1])


def query_id(number):
    return f"q-p{number:03}"


@pytest.fixture
def spoken(lab):
    """A dataset with one training query for each dialect, and one more for the first request."""
    many = (len(TABLE) + 2) * 10 // 6 + 1
    make_dataset(
        lab / "datasets" / "many",
        [(f"p{n:03}", f"Which is topic {n:03}?", f"Passage {n:03} of topic {n:03}.") for n in range(many)],
    )
    return lab


def speak(step, text):
    """`says` of a server that answers each query's `step` in its dialect, and what passes so at the first attempt only;
    and the list that gets the first request of all, which is answered well."""
    first, seen = [], Counter()

    def says(body, attempt):
        name = NAMES.get(number_of(prompt_of(body)))
        seen[prompt_of(body)] += 1
        first.append(body)
        if name is None or step_of(body) != step:
            return None
        meant, passed = text(prompt_of(body)), name in PASSES and seen[prompt_of(body)] > 1
        return said(meant) if passed or len(first) == 1 else TABLE[name].sends(meant)

    return says, first

    return says


def kept(path, *names):
    return {row["query_id"]: [row.get(name) for name in names] for row in rows(path)} if path.exists() else {}


def compare_rows(wrong, good, failed, text, reason_of):
    """Append to `wrong` what is not as the table says."""
    for number, (name, dialect) in enumerate(TABLE.items()):
        key, reason = query_id(number), reason_of(dialect)
        if reason:
            found = failed.get(key) or [None, ""]
            if found[0] != reason or dialect.words not in found[1].replace("--verdict-max", "--max"):
                wrong[name] = failed.get(key) or good.get(key)
        elif good.get(key) != text(number):
            wrong[name] = good.get(key) or failed.get(key)


@pytest.mark.parametrize("batch", [False, True])
def test_synthesis(spoken, run_script, monkeypatch, batch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    says, first = speak("positive", lambda prompt: TEXT)
    with LLMServer(says=says, batch_polls=0) as server:
        code, printed = 75, ""
        while code == 75 and len(server.batches) < 6:
            code, out, err = run_script(SYNTHESIS, "many", *GIVEN, server.url, *(["--batch"] if batch else []))
            printed += out
    assert code == 0, err
    good, failed = (
        kept(path, *names)
        for path, names in (
            (paths.synthetic("many"), ["positive"]),
            (paths.failed(paths.synthetic("many")), ["reason", "message"]),
        )
    )
    wrong = {}
    compare_rows(wrong, good, failed, lambda n: [TEXT], lambda dialect: dialect.reason)
    if step_of(first[0]) == "positive":
        wrong.pop(NAMES.get(number_of(prompt_of(first[0]))), None)
    assert wrong == {}
    assert [out.count(f"note:  {reason}: ") for reason in ("bad_request", "SAFETY", "length")] == [1, 1, 1]
    counted = [int(number) for number in re.findall(r"thoughts of the model were cut from (\d+) replies", printed)]
    assert sum(counted) >= 20
    assert "sk-test" not in printed + json.dumps(failed)
    records = json.loads(paths.run_json(paths.synthetic("many")).read_text())["results"]
    assert records["replies_with_thoughts"] == counted[-1]  # of the last run
    with LLMServer() as server:  # all of it is in the ledger, and judged the same when it is read
        paths.synthetic("many").unlink()
        code, *_ = run_script(SYNTHESIS, "many", *GIVEN, server.url)
        assert (code, len(server.requests)) == (0, 0)
    assert kept(paths.synthetic("many"), "positive") == good
    assert kept(paths.failed(paths.synthetic("many")), "reason", "message") == failed


def test_comparison(spoken, run_script, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    pairs = [{"id": "p000", "score": 2.0}, {"id": "p001", "score": 1.0}]
    found = [{"query_id": query_id(n), "query": f"Which is topic {n:03}?", "passages": pairs} for n in range(len(TABLE) + 1)]
    write_jsonl(paths.top("e5", "many"), found)

    def judge(prompt):
        return "1" if prompt.index("Passage 000") < prompt.index("Passage 001") else "2"

    says, first = speak("compare", judge)
    with LLMServer(says=lambda body, attempt: says(body, attempt) or said(judge(prompt_of(body)))) as server:
        code, printed, err = run_script(COMPARISON, "many", *GIVEN, server.url, "--model", "e5", "--k", "2")
    assert code == 0, err
    output, wrong = paths.preferences("e5", "many"), {}
    good, failed = kept(output, "preferred_id"), kept(paths.failed(output), "reason", "message")
    compare_rows(
        wrong, good, failed, lambda n: ["p000"], lambda dialect: dialect.reason if dialect.verdict is None else dialect.verdict
    )
    wrong.pop(NAMES.get(number_of(prompt_of(first[0]))), None)
    assert wrong == {}
    assert "at the token limit, which counts thoughts, too; a higher --verdict-max-tokens asks again" in printed


@pytest.mark.parametrize("name", ENDS)
def test_what_no_request_can_mend_ends_the_run(run, name):
    sends, code, words = ENDS[name]
    with LLMServer(says=lambda body, attempt: sends(TEXT)) as server:
        assert words in run(server, SYNTHESIS, code=code)
        assert len(server.requests) == 1
        server.says = lambda body, attempt: sends(TEXT) if len(server.requests) > 20 else None
        said = run(server, SYNTHESIS, "--concurrency", 2, code=code)
        assert words in said
        assert "add credit" in said or code == 2
        assert 20 <= asked(server).total() <= 20 + 4
        server.says = lambda body, attempt: None
        run(server, SYNTHESIS)  # nothing of it was kept as an answer
    assert len(rows(paths.synthetic("tiny"))) == 12
    assert not [row for row in rows(paths.synthesis_ledger("tiny")) if row["reason"]]


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_the_run_ends_it_out_of_a_batch(run, name):
    sends, code, words = ENDS[name]
    with LLMServer(batch_polls=0) as server:
        server.says = lambda body, attempt: sends(TEXT) if server.batches and "topic 05" in prompt_of(body) else None
        run(server, SYNTHESIS, "--batch", code=75)
        assert words in run(server, SYNTHESIS, "--batch", code=code)
        ledger = rows(paths.synthesis_ledger("tiny"))
        assert len(ledger) >= 33
        assert not [row for row in ledger if row["reason"]]


@pytest.mark.parametrize("batch", [[], ["--batch"]])
@pytest.mark.parametrize("name", AT_FIRST)
def test_first_request_that_is_refused_ends_the_run(run, name, batch):
    sends, words = AT_FIRST[name]
    with LLMServer(says=lambda body, attempt: sends(TEXT)) as server:
        assert words in run(server, SYNTHESIS, *batch, code=2)
        assert len(server.requests) == 1
        assert rows(paths.synthesis_ledger("tiny")) == []
        server.says = lambda body, attempt: None
        run(server, SYNTHESIS)
    assert len(rows(paths.synthetic("tiny"))) == 12


def test_many_refusals_alike_end_the_run_and_those_of_a_text_do_not(run):
    words = iter(range(10**6))

    def refuse(body, attempt):
        return failure(400, f"Request req_{next(words)} wants a system role.", None) if len(server.requests) > 1 else None

    with LLMServer(says=refuse) as server:
        told = run(server, SYNTHESIS, "--concurrency", 1, code=2)
        assert "20 requests in a row: Request req_" in told
        assert "--retry-failed" in told
        assert 21 <= asked(server).total() <= 21 + 3
        server.says = lambda body, attempt: None
        run(server, SYNTHESIS, "--retry-failed")
        assert len(rows(paths.synthetic("tiny"))) == 12
        for answer in (failure(400, "Filtered.", "content_filter"), failure(400, "Too long.", "context_length_exceeded")):
            paths.synthesis_ledger("tiny").unlink()
            paths.synthetic("tiny").unlink()
            server.says = lambda body, attempt, answer=answer: answer
            asked(server)
            run(server, SYNTHESIS, "--max-failure-rate", 1)
            assert asked(server).total() == 36


def test_batch_of_refusals_alike_ends_the_run(run):
    with LLMServer(batch_polls=0) as server:
        server.says = lambda body, attempt: failure(400, "No such role.", None) if server.batches else None
        run(server, SYNTHESIS, "--batch", code=75)
        assert "20 requests in a row: No such role." in run(server, SYNTHESIS, "--batch", code=2)


def old(step, text, finish="stop", reason=""):
    """`says` and the change that makes a ledger one of before this rule."""
    ledger = paths.synthesis_ledger("tiny")
    kept = rows(ledger)
    for row in kept:
        row.pop("message", None), row.pop("thoughts", None)
        if row["step"] == step:
            row |= {"text": text.replace("TEXT", row["text"]), "finish_reason": finish, "reason": reason}
    write_jsonl(ledger, kept)


def test_old_ledger_is_read_by_the_same_rule(run):
    with LLMServer(reply=lambda body: "yes" if step_of(body) == "verify" else default_reply(body)) as server:
        run(server, SYNTHESIS)
        asked(server)
        before = rows(paths.synthetic("tiny"))

        def again(*options, **changed):
            old(**changed)
            paths.synthetic("tiny").unlink()
            printed = run(server, SYNTHESIS, "--max-failure-rate", 1, *options)
            return printed, asked(server).total()

        printed, sent = again(step="cot", text="<think>Hm.</think>\n\nTEXT")
        assert "cut from 12 replies" in printed
        assert sent == 0
        assert sorted(map(str, kept(paths.synthetic("tiny"), "cot").items())) == sorted(
            str((row["query_id"], [row["cot"]])) for row in before
        )
        printed, sent = again(step="verify", text="<think>No, 1.</think>yes", reason="unparsable")
        assert (sent, len(rows(paths.synthetic("tiny")))) == (0, 12)
        printed, sent = again(step="negative", text="TEXT", finish="SAFETY")
        assert (sent, rows(paths.synthetic("tiny"))) == (0, [])
        assert {row["reason"] for row in rows(paths.failed(paths.synthetic("tiny")))} == {"SAFETY"}
        printed, sent = again("--retry-failed", step="negative", text="TEXT", finish="SAFETY")
        assert (sent, len(rows(paths.synthetic("tiny")))) == (24, 12)  # the verdicts that were unparsable then, too
        printed, sent = again("--max-tokens", 500, step="negative", text="half", finish="MAX_TOKENS")
        assert (sent, len(rows(paths.synthetic("tiny")))) == (12, 12)


# --- settings that are refused, in whatever words

REFUSED = [
    ("temperature", 400, {"error": {"message": "invalid temperature: only 1 is allowed for this model"}}),
    ("temperature", 400, {"error": {"message": "Unsupported value.", "param": "temperature"}}),
    ("temperature", 422, {"detail": [{"loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]}),
    ("temperature", 400, {"message": "`temperature` must be strictly positive"}),
    ("temperature", 400, {"type": "error", "error": {"message": "temperature: Extra inputs are not permitted"}}),
    ("max_tokens", 400, {"error": {"message": "'max_tokens' is not supported here. Use 'max_completion_tokens'"}}),
    ("max_tokens", 400, {"error": {"message": "Bad parameter.", "param": "max_tokens"}}),
    ("max_tokens", 422, {"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]}),
    ("response_format", 400, {"error": {"message": "response_format.type must be text/json_object"}}),
    ("response_format", 400, {"error": "json_schema is not supported"}),
    ("response_format", 400, {"error": {"message": "This model does not do structured outputs"}}),
    ("response_format", 422, {"detail": [{"loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]}),
    ("response_format", 501, {"error": {"code": 501, "message": "This server has no grammar", "type": "not_supported_error"}}),
    ("response_format", 400, {"error": {"message": "Odd value.", "param": "response_format"}}),
]


@pytest.mark.parametrize(("name", "status", "body"), REFUSED)
def test_setting_is_done_without_whatever_the_words(run, name, status, body):
    with LLMServer(says=lambda sent, attempt: Answer(status, body) if name in sent else None) as server:
        printed = run(server, SYNTHESIS, "--concurrency", 4)
        refused = [sent for sent in server.requests if name in sent]
    assert len(rows(paths.synthetic("tiny"))) == 12
    assert printed.count("note:  judge takes") == 1
    assert 1 <= len(refused) <= 4


def test_temperature_of_0_alone_may_be_refused(run):
    words = {"error": "temperature must be strictly positive"}
    with LLMServer(says=lambda sent, attempt: Answer(422, words) if sent.get("temperature") == 0 else None) as server:
        assert "takes no temperature of 0" in run(server, SYNTHESIS)
        assert all(sent.get("temperature") == 0.7 for sent in server.requests if step_of(sent) != "verify")
    assert len(rows(paths.synthetic("tiny"))) == 12


def test_setting_refused_in_any_case_is_a_refusal(run):
    def says(body, attempt):
        about = step_of(body) == "negative" and "topic 05" in prompt_of(body)
        return failure(400, "The prompt says temperature.", None) if about else None

    with LLMServer(says=says) as server:
        printed = run(server, SYNTHESIS, "--concurrency", 1)
        assert "takes no temperature" not in printed
        assert ["temperature" in body for body in server.requests if says(body, 1)] == [True, False]
        assert all("temperature" in body for body in server.requests if not says(body, 1))
    assert [row["reason"] for row in rows(paths.failed(paths.synthetic("tiny")))] == ["bad_request"]
