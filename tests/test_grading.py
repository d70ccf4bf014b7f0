"""The graded judge: what counts as an answer, what is shown, averages, log-odds, a second round, the report."""

import json
import math
import random
import re
from collections import Counter

import pytest
from conftest import load_script, write_jsonl
from llm_lab import COMPARISON, prompt_of, retrieve, rows
from llm_server import Answer, LLMServer

from syntriever.files import paths
from syntriever.llm import grading, replies
from syntriever.llm.replay import ReplayTeacher
from syntriever.report import grades as report

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
    ],
)
def test_answers_that_are_not(text):
    assert grading.parse(text, 3) is None


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
        assert len(row["replies"]) == 2
    assert "24 requests; judging the same candidates in pairs takes 120" in out


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
        new = {p for p in top[query] if p not in first[query]["grades"]}
        assert {f"p{n:02}" for n in asked.get(int(query[3:]), [])} == new == set(row["shown"])
        assert row["carried"] == 8 - len(new)
        assert row["grades"] == {p: float(max(0, 3 - abs(int(query[3:]) - int(p[1:])))) for p in top[query]}
    # Another judge starts from nothing.
    with LLMServer(reply=good) as server:
        args = ["--graded", "--llm", "other", "--base-url", server.url, "--force"]
        assert run_script(COMPARISON, "tiny", "--model", "minilm", *args)[0] == 0
    assert all(row["carried"] == 0 for row in graded("minilm").values())


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
    yes = [0.01, 0.2, 0.6, 0.95][distance(prompt, number)]
    top = [
        {"token": " Yes", "logprob": math.log(yes)},
        {"token": "no", "logprob": math.log(0.98 - yes)},
        {"token": "It", "logprob": -4},
    ]
    message = {"role": "assistant", "content": "yes" if yes > 0.5 else "no"}
    content = [{"token": message["content"], "logprob": -0.1, "top_logprobs": top}]
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
    return Answer(200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}})


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


@pytest.mark.parametrize(
    ("content", "odds"),
    [
        (
            [{"top_logprobs": [{"token": "Yes", "logprob": math.log(0.7)}, {"token": "No", "logprob": math.log(0.2)}]}],
            math.log(3.5),
        ),
        # The first token is no word; two spellings of yes; what is not listed counts as the least that is.
        (
            [
                {"top_logprobs": [{"token": "\n", "logprob": -0.1}]},
                {
                    "top_logprobs": [
                        {"token": "yes", "logprob": math.log(0.5)},
                        {"token": " YES", "logprob": math.log(0.25)},
                        {"token": "maybe", "logprob": math.log(0.05)},
                    ]
                },
            ],
            math.log(0.75 / 0.05),
        ),
        ([{"top_logprobs": [{"token": "maybe", "logprob": -0.1}]}], None),
        ([{"top_logprobs": None}], None),
        ([], None),
        (None, None),
    ],
)
def test_log_odds_by_hand(content, odds):
    found = replies.log_odds({"content": content})
    assert found == (None if odds is None else pytest.approx(odds))
    assert replies.log_odds(None) is None


def test_a_server_without_probabilities_is_not_asked_on(lab, run):
    retrieve()
    with LLMServer(reply=lambda body: "yes") as server:
        err = run(server, COMPARISON, "--graded", "--pointwise", "--concurrency", "1", code=1)
    assert "--pointwise: this server sends no probabilities" in err
    assert len(server.requests) <= 8


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


# --- the report


def test_the_report_counts_what_loops_count():
    rng = random.Random(2)
    passages = [f"p{n}" for n in range(9)]
    made = []
    for query in range(60):
        chosen = rng.sample(passages, 6)
        grades = {p: float(rng.choice([0, 0, 1, 2, 3])) for p in chosen}
        made.append({"query_id": f"q{query}", "grades": grades, "shown": rng.sample(chosen, 6), "replies": ["x"]})
    gold = {f"q{n}": {p: rng.choice([0, 1]) for p in rng.sample(passages, 3)} for n in range(40)}
    found = report.report([*made, {"query_id": "z", "reason": "unparsable"}], gold, 10)
    assert found["outcomes"] == {"graded": 60, "unparsable": 1}
    every = Counter(int(g) for row in made for g in row["grades"].values())
    assert {int(g): of["count"] for g, of in found["grades"].items()} == dict(sorted(every.items()))
    by_rank = [sum(list(row["grades"].values())[rank] for row in made) / 60 for rank in range(6)]
    assert found["by_rank"] == pytest.approx(by_rank, abs=1e-4)
    assert found["nothing"]["count"] == sum(max(row["grades"].values()) < 2 for row in made)
    halves = [sum(r["grades"][p] for p in r["shown"][:3]) / 3 - sum(r["grades"][p] for p in r["shown"][3:]) / 3 for r in made]
    assert found["first_half"]["mean"] == pytest.approx(sum(halves) / 60, abs=1e-4)
    pairs = [(g >= 2, gold[r["query_id"]].get(p, 0) >= 1) for r in made if r["query_id"] in gold for p, g in r["grades"].items()]
    both, ours, theirs = (sum(test(*pair) for pair in pairs) for test in (lambda a, b: a and b, lambda a, b: a, lambda a, b: b))
    assert found["gold"]["precision"]["share"] == pytest.approx(both / ours, abs=1e-4)
    assert found["gold"]["recall"]["share"] == pytest.approx(both / theirs, abs=1e-4)
    agree = sum(a == b for a, b in pairs) / len(pairs)
    chance = (ours * theirs + (len(pairs) - ours) * (len(pairs) - theirs)) / len(pairs) ** 2
    assert found["gold"]["kappa"] == pytest.approx((agree - chance) / (1 - chance), abs=1e-4)
    assert (found["requests"], found["pairwise_requests"]) == (60, 600)


def test_the_report_of_nothing(tmp_path):
    found = report.report([], {}, 10)
    assert found["gold"] is None
    report.draw(found, tmp_path / "x.png", "nothing")
    assert report.lines(found)
    assert load_script(COMPARISON)
