"""The graded judge: what counts as an answer, what is shown, averages, log-odds, a second round, the report."""

import json
import math
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT, make_dataset, write_jsonl
from llm_lab import COMPARISON, kill_often, prompt_of, retrieve, rows, yes_of
from llm_server import Answer, LLMServer, failure, said

from syntriever.files import paths
from syntriever.llm import grading, replies
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replay import ReplayTeacher
from syntriever.report import grades as report
from syntriever.run import lineage

# --- what counts as an answer


@pytest.mark.parametrize(
    "text",
    [
        "1: 3\n2: 0\n3: 1",
        "1: 3\n\n2: 0\n3: 1\n",
        "3: 1\n1: 3\n2: 0",
        "- 1: 3\n- 2: 0\n- 3: 1",
        "**1: 3**\n**2: 0**\n**3: 1**",
        "Passage 1: 3\nPassage 2: 0\nPassage 3: 1",
        "**Passage 1:** 3\n**Passage 2:** 0\n**Passage 3:** 1",
        "[1]: 3\n[2]: 0\n[3]: 1",
        "1 = 3\n2 = 0\n3 = 1",
        "1 -> 3\n2 -> 0\n3 -> 1",
        "1 - 3\n2 - 0\n3 - 1",
        "1: 3 (has the exact answer)\n2: 0 (nothing to do with it)\n3: 1, on the subject",
        "Here are the grades.\n1: 3\n2: 0\n3: 1",
        "```\n1: 3\n2: 0\n3: 1\n```",
        "1: grade 3\n2: grade 0\n3: grade 1",
        '{"1": 3, "2": 0, "3": 1}',
        '```json\n{"1": 3, "2": 0, "3": 1}\n```',
        '{"passage 1": 3, "passage_2": 0, "Passage 3": 1}',
        '{"grades": {"1": 3, "2": 0, "3": 1}}',
        '{"grades": [3, 0, 1]}',
        "[3, 0, 1]",
        "1. 3\n2. 0\n3. 1",
        "1) 3\n2) 0\n3) 1",
        "(1) - 3\n(2) - 0\n(3) - 1",
        "1. Passage 3: 1\n2. Passage 1: 3\n3. Passage 2: 0",
        "| Passage | Grade |\n|---|---|\n| 1 | 3 |\n| 2 | 0 |\n| 3 | 1 |",
        "## Grades\n\n- **Passage 1** – 3\n- **Passage 2** – 0\n- **Passage 3** – 1",
        "1: 3 - has the exact answer.\n2: 0 - nothing to do with it\n3: 1. It is on the subject, but does not answer.",
        'Sure! Here you are:\n```json\n{"1": 3, "2": 0, "3": 1}\n```\nI hope that helps.',
        'The grades: {"1": 3, "2": 0, "3": 1}.',
        '[{"passage": 1, "grade": 3}, {"passage": 3, "grade": 1}, {"passage": 2, "grade": 0}]',
        '{"grades": [{"passage": 1, "grade": 3}, {"passage": 2, "grade": 0}, {"passage": 3, "grade": 1}]}',
        "1: 3\r\n2: 0\r\n3: 1\r\n",
    ],
)
def test_answers_that_are_plain(text):
    assert grading.parse(text, 3) == [3, 0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 0 1",
        "1: 3\n2: 0",
        "1: 3\n2: 0\n3: 1\n4: 2",
        "1: 3\n2: 0\n2: 1\n3: 1",
        "1: 3\n2: 0\n3: 4",
        "1: 3\n2: 0\n3: -1",
        "1: 3\n2: 0\n3: 1.5",
        "1: 3\n2: 0\n3: 0-3",
        "1: 3/3\n2: 0/3\n3: 1/3",
        "1: 3, 2: 0, 3: 1",
        "1: 3\n2: 0\n3: 1 or 2: 1",
        "1: 3\n2: 0\n3: one",
        "1: 3\n2: 0\n3: 1\nOn second thought, passage 2 deserves 3.",
        '{"1": 3, "2": 0}',
        '{"1": 3, "2": 0, "3": 1, "3": 2}',
        '{"1": 3, "2": 0, "3": true}',
        '{"1": 3, "2": 0, "3": "1"}',
        '{"1": 3, "2": 0, "3": 5}',
        '{"a": 3, "b": 0, "c": 1}',
        "[3, 0]",
        "[3, 0, 1, 1]",
        '{"grades": []}',
        "{}",
        "[]",
        "[" * 2_000,
        '{"1": 3, "2": 0, "3": 1',
        "[[1, 3], [2, 0], [3, 1]]",
        "1: 3\n2: 0\n3: 1 or 2",
        "1: 3\n2: 0\n3: 1, maybe 2",
        "1: 3\n2: 0\n3: 1 (or higher)",
        "1: 3\n2: 0\n3: 1?",
        "1: 3\n2: 0\n3: 1 - 2",
        "1: 3\n2: 0\n3: between 1 and 2",
        "1: 3\n2: 0\n3: 10",
        "1: 3\n2: 0\n3: 1st",
        "1: 3\n2: 0\n1. 3: 1",  # a marker and a number, or a number and a range?
        "1: 3\n2: 0\n3: 1\n```\n1: 0\n```",
        "1: 3\n2: 0\n" + "3" * 5000 + ": 1",
        "1: ３\n2: ０\n3: １",
        '[{"passage": 1, "grade": 3}, {"passage": 1, "grade": 0}, {"passage": 3, "grade": 1}]',
        '[{"passage": 1}, {"passage": 2}, {"passage": 3}]',
        '{"1": 3, "2": 0, "3": 1, "note": "the second is off the subject"}',
        '{"grade": 3}',
        "5",
    ],
)
def test_answers_that_are_not(text):
    assert grading.parse(text, 3) is None


def test_one_passage_alone_may_get_a_grade_alone():
    assert [grading.parse(text, 1) for text in ("2", "Grade: 3", "1: 0", "Passage 1: 0")] == [[2], [3], [0], [0]]
    assert not any(grading.parse(text, 1) for text in ("Passage 1", "2 or 3", "4", "2: 3"))
    assert grading.parse("2", 2) is None


@pytest.mark.parametrize(
    "text", [mark * 20_000 for mark in ("1", " ", "-", "1: 3 ", "1. ", "{", "`", "```a\n", "{1}", "|1", "a(")]
)
def test_no_reply_takes_long_to_read(text):
    started = time.monotonic()
    grading.parse(text, 3)
    replies.log_odds({"content": [{"token": text, "top_logprobs": []}]})
    assert time.monotonic() - started < 2


# --- the command

NUMBER = re.compile(r"(?:number|about topic) (\d+)")


def shown(prompt):
    """Numbers of the passages in the order shown."""
    fence = re.search(r"lines <(\S+)>", prompt)[1]
    blocks = re.findall(rf"Passage (\d+):\n<{fence}>\n(.*?)\n</{fence}>", prompt, re.S)
    assert [int(number) for number, _ in blocks] == list(range(1, len(blocks) + 1))
    return [int(NUMBER.search(text)[1]) for _, text in blocks]


def topic(prompt):
    return int(re.search(r"topic (\d+)", prompt.partition("Query:")[2])[1])


def distance(prompt, number):
    """The scripted judge: 3 for the query's own passage, 2, 1, 0 for those that are farther off."""
    return max(0, 3 - abs(topic(prompt) - number))


def good(body):
    prompt = prompt_of(body)
    return "\n".join(f"{place}: {distance(prompt, number)}" for place, number in enumerate(shown(prompt), 1))


def graded(model="e5"):
    return {row["query_id"]: row for row in rows(paths.judgements(model, "tiny"))}


def test_every_candidate_gets_its_grade(lab, run):
    top = {row["query_id"]: [p["id"] for p in row["passages"]] for row in (retrieve(), rows(paths.top("e5", "tiny")))[1]}
    with LLMServer(reply=good) as server:
        out = run(server, COMPARISON, "--graded")
    assert len(server.requests) == 12
    found = graded()
    assert found.keys() == top.keys()
    for query, row in found.items():
        mine = int(query[3:])
        assert list(row["grades"]) == top[query]  # as retrieved
        assert row["grades"] == {p: float(max(0, 3 - abs(mine - int(p[1:])))) for p in top[query]}
        assert sorted(row["shown"]) == sorted(top[query])
        assert row["llm"] == "judge"
    # Drawn by seed: in another order than retrieved, and in the same one again.
    assert any(row["shown"] != top[query] for query, row in found.items())
    order = [shown(prompt_of(body)) for body in server.requests]
    assert sum(numbers == sorted(numbers) for numbers in order) < 6
    assert "next:  python" in out
    assert "train_stage1.py e5 tiny --judgements llm" in out
    assert "mean grade by rank" in out
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == [str(n) for n in range(1, 9)]
    assert schema["properties"]["8"] == {"type": "integer", "enum": [0, 1, 2, 3]}
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded")
    assert not server.requests


def test_a_server_without_schemas_is_asked_for_lines(lab, run):
    retrieve()

    def refuse(body, attempt):
        if "response_format" in body:
            message = "response_format is not supported"
            return Answer(400, {"error": {"message": message, "type": "invalid_request_error", "param": "response_format"}})
        return None

    with LLMServer(reply=good, says=refuse) as server:
        run(server, COMPARISON, "--graded", "--concurrency", "1")
    assert sum("response_format" in body for body in server.requests) == 1
    assert len(graded()) == 12


def test_incomplete_grades_are_asked_for_once_more_and_never_guessed(lab, run):
    retrieve()

    def reply(body):
        prompt, whole = prompt_of(body), good(body)
        if topic(prompt) == 4:
            return "\n".join(whole.splitlines()[:-1])
        if topic(prompt) == 7 and prompt.count("Answer with one line") == 1:
            return "1: 3"
        return whole

    with LLMServer(reply=reply) as server:
        run(server, COMPARISON, "--graded")
    assert len(server.requests) == 14
    assert graded().keys() == {f"q-p{n:02}" for n in range(12)} - {"q-p04"}
    (failed,) = rows(paths.failed(paths.judgements("e5", "tiny")))
    assert (failed["query_id"], failed["reason"]) == ("q-p04", "unparsable")


def test_both_orders_are_averaged(lab, run):
    retrieve()

    def biased(body):
        """The first half of what is shown gets 3, the second 0, the query's own passage 2."""
        numbers = shown(prompt_of(body))
        said = [2 if n == topic(prompt_of(body)) else 3 if place < 4 else 0 for place, n in enumerate(numbers)]
        return json.dumps({str(place): grade for place, grade in enumerate(said, 1)})

    with LLMServer(reply=biased) as server:
        out = run(server, COMPARISON, "--graded", "--both-orders")
    assert len(server.requests) == 24
    for query, row in graded().items():
        assert set(row["grades"].values()) <= {1.5, 2.0}
        assert [p for p, grade in row["grades"].items() if grade == 2.0] == [p for p in row["grades"] if p == query[2:]]
        first, second = (
            dict(zip(ids, given, strict=True)) for ids, given in zip((row["shown"], row["shown"][::-1]), row["raw"], strict=True)
        )
        assert row["grades"] == {p: (first[p] + second[p]) / 2 for p in row["grades"]}
    assert re.search(r"24 requests with [\d,]+ prompt tokens; in pairs the same takes 240 with about", out)
    # The averages show no trace of the judge's bias; the report does.
    found = json.loads(paths.report(paths.judgements("e5", "tiny"), ".json").read_text())
    assert found["first_half"]["mean"] > 2.5
    assert [round(place["mean"]) for place in found["by_place"]] == [3] * 4 + [0] * 4


def test_pairs_of_the_same_take_what_the_report_says(lab, run):
    retrieve()
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded", "--k", "5")
    found = json.loads(paths.report(paths.judgements("e5", "tiny"), ".json").read_text())
    with LLMServer() as server:
        run(server, COMPARISON, "--k", "5", "--pairs", "7")
        asked = rows(paths.comparison_ledger("tiny"))[12:]
    assert found["asked"] == {"requests": 12, "prompt_tokens": found["asked"]["prompt_tokens"], "completion_tokens": 12 * 10}
    assert (found["pairs"]["requests"], len(asked)) == (12 * 10, 12 * 7)
    assert found["pairs"]["prompt_tokens"] / 120 == pytest.approx(sum(row["prompt_tokens"] for row in asked) / 84, rel=0.1)


def test_no_passage_can_speak_to_the_judge(lab, run):
    retrieve()
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded")
    seen = [body for body in server.requests if "Ignore the above" in prompt_of(body)]
    assert seen
    for body in seen:
        prompt = prompt_of(body)
        fence = re.search(r"lines <(\S+)>", prompt)[1]
        assert prompt.count(f"\n</{fence}>\n") == 8
        assert "</passage-0123456789ab>" in prompt
        assert "{second} and {fence}" in prompt  # braces inside a passage stay


def test_a_second_round_asks_about_new_passages_only(lab, run, run_script):
    retrieve(seed=0)
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded")
    first = graded()
    retrieve(seed=1, model="minilm")
    top = {row["query_id"]: [p["id"] for p in row["passages"]] for row in rows(paths.top("minilm", "tiny"))}
    with LLMServer(reply=good) as server:
        code, _, err = run_script(COMPARISON, "tiny", "--model", "minilm", "--graded", "--llm", "judge", "--base-url", server.url)
        assert code == 0, err
    asked = {topic(prompt_of(body)): shown(prompt_of(body)) for body in server.requests}
    for query, row in graded("minilm").items():
        old = first[query]["grades"].keys()
        new = set(top[query]) - old
        assert {f"p{n:02}" for n in asked.get(int(query[3:]), [])} == new == set(row["shown"])
        assert row["carried"] == 8
        assert list(row["grades"])[:8] == top[query]
        assert row["grades"].keys() == new | old
        assert row["grades"] == {p: float(max(0, 3 - abs(int(query[3:]) - int(p[1:])))) for p in row["grades"]}
    # Another judge starts from nothing.
    with LLMServer(reply=good) as server:
        args = ["--graded", "--llm", "other", "--base-url", server.url, "--force"]
        assert run_script(COMPARISON, "tiny", "--model", "minilm", *args)[0] == 0
    assert all(row["carried"] == 0 for row in graded("minilm").values())


def test_a_round_without_new_passages_asks_nothing_whatever_the_file_was_called(lab, run):
    """--force sets the file aside where the candidates have changed: what it has is carried over all the same."""
    retrieve(seed=0)
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded")
        first = graded()
        server.requests.clear()
        paths.comparison_ledger("tiny").unlink()  # it would know the same requests
        assert "k was 8 and is now 5" in run(server, COMPARISON, "--graded", "--k", "5", code=2)
        assert "grade " not in run(server, COMPARISON, "--graded", "--k", "5", "--dry-run")  # nothing to ask
        out = run(server, COMPARISON, "--graded", "--k", "5", "--force")
        assert not server.requests
        assert "stage2/e5_tiny_judgements.jsonl.old has is not asked again" in out
        assert {q: row["grades"] for q, row in graded().items()} == {q: row["grades"] for q, row in first.items()}
        assert all((row["carried"], row["shown"]) == (8, []) for row in graded().values())
        # A third round knows what the second only carried.
        retrieve(seed=1)
        run(server, COMPARISON, "--graded", "--force")
        new = {
            q: {p["id"] for p in row["passages"]} - first[q]["grades"].keys()
            for q, row in by_query(paths.top("e5", "tiny")).items()
        }
        assert {q: set(row["shown"]) for q, row in graded().items()} == new
        assert len(server.requests) == sum(map(bool, new.values()))


def by_query(path):
    return {row["query_id"]: row for row in rows(path)}


def test_only_the_same_judge_dataset_and_texts_are_carried_over(lab, run):
    retrieve()
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded", "--limit", "2")
        path, record = paths.judgements("e5", "tiny"), lineage.load_record(paths.judgements("e5", "tiny"))
        other = paths.judgements("other_more", "tiny")

        def carried(change=lambda row, record: None, file=other, tail=b""):
            """What is carried over from a file that differs from the first in this."""
            made, about = rows(path.with_name("kept")), json.loads(json.dumps(record))
            for row in made:
                change(row, about)
            write_jsonl(file, made)
            file.write_bytes(file.read_bytes() + tail)
            paths.run_json(file).write_text(json.dumps(about))
            output = paths.judgements("e5", "tiny")
            paths.run_json(output).unlink(missing_ok=True)
            output.unlink(missing_ok=True)
            run(server, COMPARISON, "--graded", "--limit", "2")
            made = sum(row["carried"] for row in graded().values())
            file.unlink()
            return made

        path.rename(path.with_name("kept"))
        assert carried() == 16
        assert carried(tail=b'{"query_id": "q-torn') == 16  # another run is writing it
        assert carried(lambda row, about: about["options"].update(dataset="more_tiny")) == 0
        for name, value in {
            "llm": "x",
            "prompt": "x",
            "both_orders": True,
            "pointwise": True,
            "datasets/tiny/corpus.jsonl": "x",
        }.items():
            assert carried(lambda row, about, to={name: value}: about["settings"].update(to)) == 0, name
        assert carried(lambda row, about: row.update(query=f" {row['query']}\n", query_id="another id")) == 16
        assert carried(lambda row, about: row.update(query="another text")) == 0
        assert carried(file=paths.judgements("x", "another")) == 0


def test_equal_texts_are_one_passage(lab, run):
    """By the id of the first: among the candidates, as the source of a query, in what is carried over and recorded, and gold."""
    corpus = rows(paths.corpus("tiny"))
    write_jsonl(
        paths.corpus("tiny"),
        [*corpus, {"_id": "twin", "text": corpus[5]["text"] + " "}, {"_id": "twin2", "text": corpus[6]["text"]}],
    )
    write_jsonl(paths.generated("tiny"), [{"query_id": "g", "query": "about topic 05", "kind": "typed", "passage_id": "p05"}])
    top = [{"id": i, "score": 1.0} for i in ("p00", "twin", "p05", "twin2", "p01")]
    write_jsonl(paths.top("e5", "tiny"), [{"query_id": "g", "query": "about topic 05", "passages": top}])
    write_jsonl(paths.top("minilm", "tiny"), [{"query_id": "g", "query": "about topic 05", "passages": [top[3], top[1]]}])
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded", "--queries", "generated", "--k", "4")
        assert list(graded()["g"]["grades"]) == ["p00", "p05", "p06", "p01"]
        server.requests.clear()
        run(server, COMPARISON, "--graded", "--queries", "generated", "--k", "2", "--model", "minilm")
        assert not server.requests
    ranked = {"query": "about topic 05", "ranking": [["twin2"], ["p00"], ["twin", "p05"], ["p01"]]}
    write_jsonl(paths.dataset("tiny") / "recorded" / "preferences.jsonl", [ranked])
    run(None, COMPARISON, "--graded", "--queries", "generated", "--llm", "replay", "--k", "4", "--force")
    assert graded()["g"]["grades"] == {"p00": 1.0, "p05": 0.5, "p06": 2.0, "p01": 0.0}


def test_a_source_that_is_gone_is_named_before_anything_is_paid(lab, run):
    write_jsonl(paths.generated("tiny"), [{"query_id": "g-1", "query": "about topic 11", "kind": "typed", "passage_id": "gone"}])
    write_jsonl(
        paths.top("e5", "tiny"), [{"query_id": "g-1", "query": "about topic 11", "passages": [{"id": "p00", "score": 1.0}]}]
    )
    with LLMServer(reply=good) as server:
        assert "'g-1' is of passage 'gone'" in run(server, COMPARISON, "--graded", "--queries", "generated", "--k", "1", code=2)
    assert not server.requests


def test_a_query_that_does_not_train_is_named_before_anything_is_paid(lab, run):
    write_jsonl(paths.generated("tiny"), [{"query_id": "g-1", "query": "about topic 11", "kind": "typed", "passage_id": "p05"}])
    found = [{"id": i, "score": 1.0} for i in ("p00", "p01")]
    write_jsonl(paths.top("e5", "tiny"), [{"query_id": "g-1", "query": "about topic 11", "passages": found}])
    with LLMServer(reply=good) as server:
        for graded in ([], ["--graded"]):
            said = run(server, COMPARISON, *graded, "--k", "2", code=2)
            assert "1 queries, 'g-1' among them, are not of those that train (gold)" in said
    assert not server.requests


def test_a_reply_that_is_cut_off_names_the_option_that_helps(lab, run):
    retrieve()
    with LLMServer(reply=lambda body: {"content": "1: 3", "finish_reason": "length"}) as server:
        out = run(server, COMPARISON, "--graded", "--limit", "1", "--max-failure-rate", "1")
        assert "a higher --verdict-max-tokens asks again" in out
        server.requests.clear()
        run(server, COMPARISON, "--graded", "--limit", "1", "--max-failure-rate", "1", "--verdict-max-tokens", "99")
        assert [body["max_tokens"] for body in server.requests] == [99 + 12 * 8]


@pytest.mark.parametrize("more", [[], ["--both-orders"], ["--pointwise"]])
def test_batches_end_in_the_rows_of_a_live_run(lab, run, run_script, more):
    retrieve()
    given = [COMPARISON, "tiny", "--model", "e5", "--graded", *more, "--llm", "judge", "--limit", "4", "--base-url"]
    says = yes_or_no if more == ["--pointwise"] else lambda body, n: None
    with LLMServer(reply=good, says=says) as server:
        run(server, COMPARISON, "--graded", *more, "--limit", "4")
        live = graded()
        for path in paths.home().glob("stage2/*tiny_[jp]*"):
            path.unlink()
        codes = [run_script(*given, server.url, "--batch")[0] for _ in range(3)]
    assert codes == [75, 75, 0]  # one round of requests, though each query has several
    assert graded() == live
    assert len(server.batches) == 1


def test_a_file_that_was_cut_anywhere_is_completed_without_a_request(lab, run):
    retrieve()
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded", "--limit", "5")
        whole, expected = paths.judgements("e5", "tiny").read_bytes(), graded()
        server.requests.clear()
        for end in range(0, len(whole), len(whole) // 7):
            paths.judgements("e5", "tiny").write_bytes(whole[:end])
            run(server, COMPARISON, "--graded", "--limit", "5")
            assert graded() == expected
            assert len(rows(paths.judgements("e5", "tiny"))) == 5
    assert not server.requests


def test_killed_at_random_moments_it_ends_in_the_same_rows(lab, run):
    made = [(f"p{n:03}", f"Which is topic {n}?", f"Passage number {n} is about topic {n}.") for n in range(250)]
    shutil.rmtree(lab / "datasets" / "tiny")
    make_dataset(lab / "datasets" / "tiny", made)
    found = [{"id": f"p{n:03}", "score": 1.0} for n in range(250)]
    top = [{"query_id": f"q-p{n:03}", "query": f"Which is topic {n}?", "passages": found[n : n + 8]} for n in range(150)]
    write_jsonl(paths.top("e5", "tiny"), top)
    ledger, rng, kills, concurrency = paths.comparison_ledger("tiny"), random.Random(5), 6, 8
    with LLMServer(good) as server:
        run(server, COMPARISON, "--graded")
        calm = graded()
        for path in (paths.judgements("e5", "tiny"), ledger):
            path.unlink()
        server.requests.clear()
        server.latency = 0.03
        command = [ROOT / COMPARISON, "tiny", "--model", "e5", "--graded", "--llm", "judge"]
        command += ["--base-url", server.url, "--concurrency", concurrency]
        kill_often(ledger, rng, kills, 5_000, *command)
        assert len(rows(ledger)) < 150
        run(server, COMPARISON, "--graded")
    assert graded() == calm
    assert len(rows(paths.judgements("e5", "tiny"))) == len({row["key"] for row in rows(ledger)}) == len(rows(ledger)) == 150
    assert len(server.requests) <= 150 + kills * concurrency


def test_the_order_shown_is_stable():
    ids = [f"p{n}" for n in range(9)]
    shown = grading.order_shown("why?", ids, 1)
    assert shown == grading.order_shown("why?", ids[::-1], 1)
    assert [p for p in shown if p != "p3"] == grading.order_shown("why?", [p for p in ids if p != "p3"], 1)
    assert len({tuple(grading.order_shown(query, ids, seed)) for query in "abc" for seed in range(3)}) == 9


def test_the_source_of_a_generated_query_is_among_its_candidates(lab, run):
    write_jsonl(paths.generated("tiny"), [{"query_id": "g-1", "query": "about topic 11", "kind": "typed", "passage_id": "p11"}])
    found = [{"id": f"p{n:02}", "score": 1.0} for n in range(8)]
    write_jsonl(paths.top("e5", "tiny"), [{"query_id": "g-1", "query": "about topic 11", "passages": found}])
    with LLMServer(reply=good) as server:
        run(server, COMPARISON, "--graded", "--queries", "generated", "--k", "5")
    assert list(graded()["g-1"]["grades"]) == ["p00", "p01", "p02", "p03", "p11"]


def test_a_dry_run_asks_nothing_and_a_kill_loses_nothing(lab, run):
    retrieve()
    with LLMServer(reply=good) as server:
        out = run(server, COMPARISON, "--graded", "--dry-run")
        assert not server.requests
        assert re.search(r"grade +12 ", out)
        run(server, COMPARISON, "--graded", "--max-requests", "5", code=1)
        assert len(server.requests) == 5
        run(server, COMPARISON, "--graded")
    assert len(server.requests) == 12
    assert len(graded()) == 12


# --- probabilities


def yes_or_no(body, attempt):
    prompt = prompt_of(body)
    number = int(NUMBER.search(re.search(r"\n<(\S+)>\n(.*)\n</\1>", prompt, re.S)[2])[1])
    return yes_of([0.01, 0.2, 0.6, 0.95][distance(prompt, number)])


def test_pointwise_grades_are_the_log_odds_of_yes(lab, run):
    retrieve()
    with LLMServer(says=yes_or_no) as server:
        run(server, COMPARISON, "--graded", "--pointwise", "--k", "5")
    assert len(server.requests) == 60
    assert all(body["logprobs"] and "response_format" not in body for body in server.requests)
    for query, row in graded().items():
        for passage, odds in row["log_odds"].items():
            yes = [0.01, 0.2, 0.6, 0.95][max(0, 3 - abs(int(query[3:]) - int(passage[1:])))]
            wanted = math.log(yes / (0.98 - yes))
            if yes > 0.02 and 0.98 - yes > 0.03:  # else the least of what was listed counts
                assert odds == pytest.approx(wanted, abs=1e-3)
            assert row["grades"][passage] == pytest.approx(3 / (1 + math.exp(-odds)), abs=1e-3)


def place(token, **top):
    return {"token": token, "logprob": -0.1, "top_logprobs": [{"token": word, "logprob": lp} for word, lp in top.items()]}


YES = place("Yes", Yes=math.log(0.7), No=math.log(0.2))


@pytest.mark.parametrize(
    ("content", "odds"),
    [
        ([YES], math.log(3.5)),
        # The first token is no word; spellings add up; what is not listed counts as the least that is.
        (
            [place("\n"), place("yes", **{"yes": math.log(0.5), " YES": math.log(0.25), "maybe": math.log(0.05)})],
            math.log(0.75 / 0.05),
        ),
        # Thoughts speak of yes and no before the answer does.
        (
            [place("<think>"), place("No", No=-0.1, Yes=-3.0), place(" wait", Yes=-1.0), place("</think>"), place("\n\n"), YES],
            math.log(3.5),
        ),
        ([place("<think>"), place("No", No=-0.1, Yes=-3.0)], None),
        # Only the first word counts.
        ([place("I", I=-0.1), YES], None),
        ([place("**", **{"**": -0.1}), YES], math.log(3.5)),
        ([place("Yes", Yes=0.0, No=-math.inf)], math.log(1e12)),
        ([place("maybe", maybe=-0.1)], None),
        ([{"token": "Yes", "top_logprobs": None}], None),
        ([{"token": "Yes", "top_logprobs": [{"token": "Yes", "logprob": None}]}], None),
        ([{"token": None}], None),
        (["Yes"], None),
        ([], None),
        (None, None),
    ],
)
def test_log_odds_by_hand(content, odds):
    found = replies.log_odds({"content": content})
    assert found == (None if odds is None else pytest.approx(odds))
    assert replies.log_odds(None) is replies.log_odds({"tokens": []}) is None


def test_an_answer_whose_first_word_is_no_choice_fails(lab, run):
    retrieve()
    content = [place("Y", Y=-0.1, N=-2.0), place("es", es=-0.1)]
    told = said("yes").body
    told["choices"][0]["logprobs"] = {"content": content}
    with LLMServer(says=lambda body, n: Answer(200, told)) as server:
        run(server, COMPARISON, "--graded", "--pointwise", "--limit", 1, "--max-failure-rate", 1)
    (failed,) = rows(paths.failed(paths.judgements("e5", "tiny")))
    assert (failed["reason"], len(failed["shown"])) == ("unparsable", 8)


def test_addresses_in_old_ledgers_are_as_ever(tmp_path):
    """New fields of a request enter its address only where they are set; a row has log-odds only where it was given some."""
    plain = Request("grade", ("q",), "Why?", 0.0, 9)
    old = lineage.text_sha256(["m", "Why?", 0.0, ()])[:32]
    assert old == plain.key("m") == replace(plain, fields=("1",)).key("m") != replace(plain, logprobs=True).key("m")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for request, odds in ((plain, None), (replace(plain, logprobs=True), 1.5)):
        ledger.add(request.key("m"), request, "m", replies.Reply("yes", finish_reason="stop", log_odds=odds))
    assert ["log_odds" in row for row in rows(tmp_path / "ledger.jsonl")] == [False, True]
    ledger.close()
    again = Ledger(tmp_path / "ledger.jsonl", read_only=True)
    assert [again.get(r.key("m"), 9).log_odds for r in (plain, replace(plain, logprobs=True))] == [None, 1.5]


def test_a_server_without_probabilities_is_not_asked_on(lab, run):
    retrieve()
    with LLMServer(reply=lambda body: "yes") as server:
        err = run(server, COMPARISON, "--graded", "--pointwise", "--concurrency", "1", code=1)
    assert "gives no log-probabilities for judge: leave out --pointwise" in err
    assert len(server.requests) == 1
    assert rows(paths.comparison_ledger("tiny")) == []  # another server of that model is asked


def test_a_server_that_refuses_to_say_probabilities_is_not_asked_on(lab, run):
    retrieve()
    wrong = failure(400, "This model does not support logprobs.", None)
    with LLMServer(reply=lambda body: "yes", says=lambda body, n: wrong if "logprobs" in body else None) as server:
        err = run(server, COMPARISON, "--graded", "--pointwise", code=1)
    assert "leave out --pointwise" in err
    assert ["logprobs" in body for body in server.requests] == [True, False]


@pytest.mark.parametrize("more", [["--pointwise"], ["--graded", "--pointwise", "--both-orders"], ["--graded", "--k", "0"]])
def test_options_that_mean_nothing_are_refused(lab, run, more):
    retrieve()
    run(None, COMPARISON, *more, code=2)


# --- recorded rankings


def test_recorded_rankings_give_grades(lab, run):
    folder = paths.dataset("tiny") / "recorded"
    ranked = {"query": "Which is topic 00?", "ranking": [["p01"], ["p02", "p03"], ["p04"], ["p05", "p06"]], "relevant": ["p02"]}
    plain = {"query": "Which is topic 01?", "ranking": [["p01", "p02"], ["p03"]]}
    write_jsonl(folder / "preferences.jsonl", [ranked, plain])
    teacher = ReplayTeacher("tiny")
    every = ["p06", "p01", "p02", "p03", "p04", "p09"]
    assert teacher.grades("Which is topic 00?", every) == {"p06": 0, "p01": 1, "p02": 2, "p03": 0.5, "p04": 0.5}
    assert list(teacher.grades("Which is topic 00?", every)) == ["p06", "p01", "p02", "p03", "p04"]
    assert teacher.grades("Which is topic 01?", every) == {"p01": 2, "p02": 2, "p03": 0.5}
    assert teacher.grades("another", every) == {}
    found = [{"id": f"p{n:02}", "score": 1.0} for n in range(8)]
    write_jsonl(
        paths.top("e5", "tiny"),
        [{"query_id": f"q-p{n:02}", "query": f"Which is topic {n:02}?", "passages": found} for n in range(4)],
    )
    out = run(None, COMPARISON, "--graded", "--llm", "replay")
    assert {query: row["grades"] for query, row in graded().items()} == {
        "q-p00": {"p01": 1, "p02": 2, "p03": 0.5, "p04": 0.5, "p05": 0, "p06": 0},
        "q-p01": {"p01": 2, "p02": 2, "p03": 0.5},
    }
    assert "2 queries have no recorded verdict" in out
    assert "7 of the passages have no recorded grade" in out


@pytest.mark.parametrize(
    ("row", "grades"),
    [
        ({"ranking": []}, {}),
        ({"ranking": [["p01"]]}, {"p01": 2}),
        ({"ranking": [["p01"], ["p02", "p03"]]}, {"p01": 2, "p02": 0.5, "p03": 0.5}),
        ({"ranking": [["p01"], ["p02"], ["p03"]]}, {"p01": 2, "p02": 1, "p03": 0}),
        ({"ranking": [["p01"], ["p02"], ["p03"]], "relevant": []}, {"p01": 1, "p02": 0.5, "p03": 0}),
        ({"ranking": [["p01", "p02"], ["p03"]], "relevant": ["p03"]}, {"p01": 0.5, "p02": 0.5, "p03": 2}),
        ({"ranking": [["p01"]], "relevant": ["p01", "p02"]}, {"p01": 2, "p02": 2}),
    ],
)
def test_recorded_grades_by_hand(lab, row, grades):
    write_jsonl(paths.dataset("tiny") / "recorded" / "preferences.jsonl", [{"query": "why?", **row}])
    assert ReplayTeacher("tiny").grades("why?", ["p01", "p02", "p03", "p04"]) == grades


@pytest.mark.parametrize(
    "row", [{"ranking": ["p01"]}, {"ranking": [[1]]}, {"ranking": [["p01"]], "relevant": None}, {"ranking": {}}]
)
def test_recorded_rankings_of_another_shape_are_named(lab, run, row):
    retrieve()
    write_jsonl(paths.dataset("tiny") / "recorded" / "preferences.jsonl", [{"query": "why?", **row}])
    assert "recorded/preferences.jsonl:1" in run(None, COMPARISON, "--graded", "--llm", "replay", code=2)


def test_recorded_texts_alone_answer_no_comparison(lab, run):
    retrieve()
    write_jsonl(paths.dataset("tiny") / "recorded" / "synthesis.jsonl", [{"query": "why?"}])
    assert "12 queries have no recorded verdict" in run(None, COMPARISON, "--graded", "--llm", "replay")
    assert "--pointwise needs a model" in run(None, COMPARISON, "--graded", "--pointwise", "--llm", "replay", code=2)


# --- the report


@pytest.mark.parametrize("both_orders", [False, True])
def test_the_report_counts_what_loops_count(both_orders):
    rng = random.Random(2)
    passages, k, made = [f"p{n}" for n in range(12)], 6, []
    ranked = {f"q{n}": rng.sample(passages, k) for n in range(60)}
    for query, top in ranked.items():
        shown, carried = rng.sample(top, 5), rng.sample([p for p in passages if p not in top], 2)  # the last of top has no grade
        raw = [[rng.choice([0, 0, 1, 2, 3]) for _ in shown] for _ in range(1 + both_orders)]
        orders = [dict(zip(shown[:: 1 - 2 * n], given, strict=True)) for n, given in enumerate(raw)]
        grades = {p: sum(order[p] for order in orders) / len(orders) for p in shown} | {
            p: rng.choice([0.0, 2.0]) for p in carried
        }
        made.append({"query_id": query, "grades": grades, "shown": shown, "raw": raw, "carried": 2, "prompt_tokens": 7})
    gold = {f"q{n}": {p: rng.choice([0, 1]) for p in rng.sample(passages, 5)} for n in range(40)}
    found = report.report([*made, {"query_id": "z", "reason": "unparsable"}], gold, ranked.get, lambda row: (10, 2.5), 2)
    assert found["outcomes"] == {"graded": 60, "unparsable": 1}
    every = Counter(math.floor(g) for row in made for g in row["grades"].values())
    assert {int(g): of["count"] for g, of in found["grades"].items()} == dict(sorted(every.items()))
    for rank in range(k):
        of_rank = [r["grades"][ranked[r["query_id"]][rank]] for r in made if ranked[r["query_id"]][rank] in r["grades"]]
        assert found["by_rank"][rank]["of"] == len(of_rank)
        assert found["by_rank"][rank]["mean"] == pytest.approx(sum(of_rank) / len(of_rank), abs=1e-4)
    assert found["nothing"]["count"] == sum(max(row["grades"].values()) < 2 for row in made)
    halves = [sum((sum(o[:2]) - sum(o[3:])) / 2 for o in r["raw"]) / len(r["raw"]) for r in made]
    mean = sum(halves) / 60
    half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in halves) / 59 / 60)
    assert found["first_half"] == {"mean": round(mean, 4), "of": 60, "interval": [round(mean - half, 4), round(mean + half, 4)]}
    places = [[o[n] for r in made for o in r["raw"]] for n in range(5)]
    assert [of["mean"] for of in found["by_place"]] == pytest.approx([sum(p) / len(p) for p in places], abs=1e-4)
    pairs = [(g >= 2, gold[r["query_id"]].get(p, 0) >= 1) for r in made if r["query_id"] in gold for p, g in r["grades"].items()]
    both, ours, theirs = (sum(test(*pair) for pair in pairs) for test in (lambda a, b: a and b, lambda a, b: a, lambda a, b: b))
    assert found["gold"]["precision"]["share"] == pytest.approx(both / ours, abs=1e-4)
    assert found["gold"]["recall"]["share"] == pytest.approx(both / theirs, abs=1e-4)
    agree = sum(a == b for a, b in pairs) / len(pairs)
    chance = (ours * theirs + (len(pairs) - ours) * (len(pairs) - theirs)) / len(pairs) ** 2
    assert found["gold"]["kappa"] == pytest.approx((agree - chance) / (1 - chance), abs=1e-4)
    assert found["asked"] == {"requests": 60 * (1 + both_orders), "prompt_tokens": 420, "completion_tokens": 0}
    assert found["pairs"] == {"requests": 600, "prompt_tokens": 150}
    assert found["carried"] == 120


def test_the_report_of_nothing(tmp_path):
    found = report.report([], {}, lambda query: [], lambda row: (0, 0.0), 2)
    assert found["gold"] is None
    report.draw(found, tmp_path / "x.png", "nothing")
    assert report.lines(found) == []
