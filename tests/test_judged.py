"""A test set of one's own: a pool of several models that an LLM grades; and where the pipeline stands without labels."""

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, SFT, file_size_limit, make_dataset, write_jsonl
from llm_lab import prompt_of, rows, yes_of
from llm_server import LLMServer
from test_llm_stages import wait_for

from syntriever.data import dataset, training
from syntriever.data.corpus import Corpus
from syntriever.encode import bm25
from syntriever.files import paths
from syntriever.llm import pool
from syntriever.report import metrics
from syntriever.run import lineage

STATUS = "syntriever/status.py"
NEXT = re.compile(r"^next: +(python .*)$", re.M)
FAST = ("--device", "cpu", "--backend", "torch")


def shown(prompt):
    """The topic of the query and those of the passages, in the order shown."""
    return int(re.search(r"topic (\d+)\?", prompt)[1]), [int(n) for n in re.findall(r"\nPassage number (\d+)", prompt)]


def grade(topic, passage):
    """What the judge of these tests says."""
    return max(0, 3 - abs(topic - passage))


def grader(body):
    topic, passages = shown(prompt_of(body))
    return "\n".join(f"{n}: {grade(topic, passage)}" for n, passage in enumerate(passages, 1))


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """24 passages, the last 4 of which repeat the first 4, and a generated query for each of the first 20; every second
    is kept as a test set."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(training, "FOLDS", 2)
    texts = [f"Passage number {n:02} is about topic {n:02}." for n in (*range(20), *range(4))]
    write_jsonl(paths.corpus("notes"), [{"_id": f"p{n:02}", "text": text} for n, text in enumerate(texts)])
    written = [(f"g{n:02}", f"Which is topic {n:02}?", f"p{n:02}") for n in range(20)]
    write_jsonl(
        paths.generated("notes"), [{"query_id": q, "query": text, "kind": "question", "passage_id": p} for q, text, p in written]
    )
    return tmp_path


@pytest.fixture
def judged(run_script):
    """judged(server, "bm25", ..., code=0): what `evaluate.py ... --split judged` said."""

    def run(server, *words, ds="notes", code=0):
        given = ["--llm", "judge", "--base-url", server.url] if server else []
        found, out, err = run_script("evaluate.py", ds, *words, "--split", "judged", "--ks", "1,5,10", *FAST, *given)
        assert found == code, err
        return err if code else out

    return run


def test_a_pool_by_hand(notes):
    corpus = Corpus("notes")
    one = {"a": [(f"p{n:02}", 1.0) for n in (20, 5, *range(6, 16))], "b": [("p21", 1.0), ("p01", 0.9)]}
    two = {"a": [("p00", 1.0), ("p19", 0.5)], "b": [], "c": [("p03", 1.0)]}
    made = pool.pooled([one, two], corpus)
    assert made == {"a": ["p00", *(f"p{n:02}" for n in range(5, 14)), "p19"], "b": ["p01"], "c": ["p03"]}
    asked = list(pool.portions(made, {"a": {"p05": 3.0, "p19": 0.0}}))
    assert asked == [("a", ["p00", *(f"p{n:02}" for n in range(6, 13))]), ("a", ["p13"]), ("b", ["p01"]), ("c", ["p03"])]


@pytest.mark.parametrize("seed", range(10))
def test_what_a_killed_run_left_is_asked_for_as_it_was(seed):
    rng = random.Random(seed)
    made = {q: [f"{q}{n:02}" for n in range(rng.randrange(40))] for q in "abcd"}
    every = list(pool.portions(made, {}))
    assert sum(len(passages) for _, passages in every) == sum(map(len, made.values()))
    kept = [item for item in every if rng.random() < 0.5]
    known = {}
    for query, passages in kept:
        known.setdefault(query, {}).update(dict.fromkeys(passages, 1.0))
    assert list(pool.portions(made, known)) == [item for item in every if item not in kept]


def test_an_llm_judges_the_pool_and_says_so(notes, judged, tiny_encoder):
    kept = training.load("notes", None).reserved
    assert 3 < len(kept) < 17
    with LLMServer(reply=grader) as server:
        out = judged(server, "bm25", tiny_encoder)
        requests = [shown(prompt_of(body)) for body in server.requests]
    tops = {}
    for name in ("bm25", "e5-small-tiny"):
        for line in paths.result(name, "notes", "judged", ".trec").read_text().splitlines():
            query, _, passage, rank, *_ = line.split()
            assert int(rank) <= 10
            tops.setdefault(query, set()).add(int(passage[1:]) % 20)
    assert tops.keys() == kept.keys()
    # Each distinct text of the pool is shown once, eight at most in a request.
    assert sorted((topic, p) for topic, passages in requests for p in passages) == sorted(
        (int(q[1:]), p) for q in tops for p in tops[q]
    )
    assert len(requests) == sum(math.ceil(len(found) / 8) for found in tops.values())
    assert max(len(passages) for _, passages in requests) == 8
    # The file: grades 0 to 3 as 0, 0, 1, 2; repeated texts have the grade of the first.
    qrels = dataset.load_qrels("notes", "judged")
    corpus = Corpus("notes")
    for query in kept:
        same = [*tops[query], *(p + 20 for p in tops[query] if p < 4)]
        assert qrels[query] == {f"p{p:02}": (0, 0, 1, 2)[grade(int(query[1:]), p % 20)] for p in same}
    # The measures are those of any split.
    hits = dict(bm25.run(corpus, kept, 10))
    made = json.loads(paths.result("bm25", "notes", "judged", ".json").read_text())
    expected = metrics.evaluate(qrels, {q: dict(found) for q, found in hits.items()}, (1, 5, 10))
    assert made["measures"] == {name: pytest.approx(metrics.mean(values)) for name, values in expected.items()}
    assert made["queries"] == len(kept)
    # Who judged stands wherever a figure does.
    line = "judged by an LLM (judge), not by a person; of its grades 0 to 3, 2 and 3 count as relevant, as 1 and 2"
    assert made["judged_by"] == line
    assert made["unjudged"] == 0
    assert line in out
    assert "share of the top 10 that is not judged: bm25 0.0000, e5-small-tiny 0.0000" in out
    assert "e5-small-tiny - bm25" in out or "e5-small-tiny" in out.split("paired test")[1]
    assert line in paths.report_html().read_text()
    record = lineage.load_record(paths.qrels("notes", "judged"))
    assert record["results"]["judged_by"] == line
    assert record["results"]["pool"] == {
        "models": ["bm25", "e5-small-tiny"],
        "depth": 10,
        "queries": len(kept),
        "passages": sum(map(len, qrels.values())),
    }
    assert record["results"]["grade_in_file"] == {"0": 0, "1": 0, "2": 1, "3": 2}
    assert lineage.load_record(paths.judged("notes"))["settings"].keys() >= {"llm", "prompt", "temperature", "seed"}
    result = lineage.load_record(paths.result("bm25", "notes", "judged", ".json"))
    assert {"datasets/notes/qrels/judged.tsv", "datasets/notes_generated.jsonl"} <= result["inputs"].keys()


def test_a_small_judge_says_yes_or_no_to_one_passage_at_a_time(notes, judged, tiny_encoder):
    yes = (0.02, 0.3, 0.6, 0.95)  # of each grade; three times it is 0, 1, 2 and 3

    def says(body, attempt):
        topic, (passage,) = shown(prompt_of(body))
        return yes_of(yes[grade(topic, passage)])

    with LLMServer(says=says) as server:
        out = judged(server, "bm25", "--pointwise")
        assert "pointwise was True and is now False" in judged(server, "bm25", tiny_encoder, code=2)
        # Unless another is named the same judge goes on, in its own way, and is asked about nothing twice.
        judged(None, "bm25", tiny_encoder, "--base-url", server.url)
        asked = len(server.requests)
    qrels = dataset.load_qrels("notes", "judged")
    assert asked == sum(len({int(p[1:]) % 20 for p in found}) for found in qrels.values())
    for query, found in qrels.items():
        assert found == {p: (0, 0, 1, 2)[grade(int(query[1:]), int(p[1:]) % 20)] for p in found}
    line = "judged by an LLM (judge), not by a person; of 3 times the probability of its yes, rounded, 2 and 3 count as relevant"
    assert line in out
    assert len(qrels) > 3


def test_a_later_model_has_only_its_new_passages_judged(notes, judged, tiny_encoder, monkeypatch):
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
        first = {(topic, p) for body in server.requests for topic, ps in [shown(prompt_of(body))] for p in ps}
        server.requests.clear()
        out = judged(server, tiny_encoder)
        then = [(topic, p) for body in server.requests for topic, ps in [shown(prompt_of(body))] for p in ps]
    assert then
    assert len(then) == len(set(then))
    assert not first & set(then)
    assert f"{len(then)} to judge" in out
    both = dataset.load_qrels("notes", "judged")
    assert {(int(q[1:]), int(p[1:])) for q, found in both.items() for p in found if int(p[1:]) < 20} == first | set(then)
    assert lineage.load_record(paths.qrels("notes", "judged"))["results"]["pool"]["models"] == ["bm25", "e5-small-tiny"]
    monkeypatch.delenv("OPENAI_API_KEY")
    before = paths.qrels("notes", "judged").read_bytes()
    out = judged(None, "bm25", tiny_encoder)  # nobody is asked: no key, no server
    assert " 0 to judge" in out
    assert "judged by an LLM (judge)" in out
    assert " 0 to judge" in judged(None, "bm25")
    assert paths.qrels("notes", "judged").read_bytes() == before
    assert lineage.load_record(paths.qrels("notes", "judged"))["results"]["pool"]["models"] == ["bm25", "e5-small-tiny"]
    assert "was 'judge' and is now 'other'" in judged(
        None, "bm25", "--llm", "other", "--base-url", "http://127.0.0.1:9/v1", code=2
    )


def test_another_judge_does_not_go_on_under_the_name_of_the_first(notes, judged, tiny_encoder):
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
    first, second = notes / "first.jsonl", notes / "second.jsonl"
    replies = rows(paths.judged_ledger("notes"))
    write_jsonl(first, replies)
    write_jsonl(second, [{**reply, "model": "other"} for reply in replies])
    paths.judged("notes").unlink()
    judged(None, "bm25", "--llm", "replay", "--ledger", first)
    before = paths.judged("notes").read_bytes()
    said = judged(None, "bm25", tiny_encoder, "--ledger", second, code=2)
    assert "was judged by judge, which is not what replay is now; name the judge (--llm)" in said
    assert paths.judged("notes").read_bytes() == before


def test_each_dataset_has_its_own_judge(notes, judged, monkeypatch):
    for path in (paths.corpus, paths.generated):
        path("more").parent.mkdir(parents=True, exist_ok=True)
        path("more").write_bytes(path("notes").read_bytes())
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
        judged(None, "bm25", "--llm", "other", "--base-url", server.url, ds="more")
    monkeypatch.delenv("OPENAI_API_KEY")
    out = judged(None, "bm25", "more")  # and nobody is asked
    assert out.count(" 0 to judge") == 2
    assert "judged by an LLM (judge)" in out
    assert "judged by an LLM (other)" in out


def test_the_pool_is_as_deep_where_a_query_is_no_answer_to_itself(notes, judged, run_script, monkeypatch):
    monkeypatch.setattr(dataset, "SELF_RETRIEVAL", {"notes"})
    with LLMServer(reply=grader) as server:
        given = ["--split", "judged", "--ks", "1,3", "--llm", "judge", "--base-url", server.url]
        code, _, err = run_script("evaluate.py", "bm25", "notes", *given)
        assert code == 0, err
        found = [shown(prompt_of(body)) for body in server.requests]
    asked = {topic: sum(len(passages) for other, passages in found if other == topic) for topic, _ in found}
    assert max(asked.values()) == 10


def test_failures_of_a_later_run_are_measured_against_all_requests(notes, judged):
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
        total = len(server.requests)
    paths.judged("notes").unlink()
    paths.judged_ledger("notes").unlink()
    with LLMServer(reply=grader) as server:
        judged(server, "bm25", "--max-requests", total - 2, code=1)
    answers = iter(["I cannot say."] * 2)
    with LLMServer(reply=lambda body: next(answers, None) or grader(body)) as server:
        judged(server, "bm25", "--concurrency", "1", "--max-failure-rate", 1.5 / total)


@pytest.mark.parametrize("queries", [*training.KINDS, "all", None])
def test_no_judged_query_trains(notes, judged, queries):
    """Not under its id, its text or its source, whichever queries train."""
    log = [{"_id": f"q{n}", "text": f"WHICH is  topic {n:02}?" if n < 8 else f"What of topic {n}?"} for n in range(30)]
    write_jsonl(paths.queries("notes"), log)
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
    found = dataset.load_qrels("notes", "judged")
    kept = training.load("notes", "all").reserved
    assert found.keys() == kept.keys()
    if queries == "gold":
        return
    train = training.load("notes", queries)
    assert train.queries
    assert not found.keys() & train.queries.keys()
    said = [{" ".join(text.casefold().split()) for text in texts.values()} for texts in (kept, train.queries)]
    assert not said[0] & said[1]


def test_more_queries_and_another_text_of_one_keep_the_grades_of_the_others(notes, judged):
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
        before, written = dataset.load_qrels("notes", "judged"), rows(paths.generated("notes"))
        (changed, topic), *_ = ((row, int(row["query_id"][1:])) for row in written if row["query_id"] in before)
        changed["query"] = f"And which one is topic {topic:02}?"
        write_jsonl(paths.generated("notes"), written)
        write_jsonl(
            paths.queries("notes"), [{"_id": "q1", "text": "Where is topic 05?"}, {"_id": "q2", "text": "What of topic 06?"}]
        )
        server.requests.clear()
        judged(server, "bm25")
        new = {query for query in training.load("notes", "all").reserved if query not in before}
        asked = {shown(prompt_of(body))[0] for body in server.requests}
    assert topic in asked
    assert asked <= {topic, *({5} if "q1" in new else {}), *({6} if "q2" in new else {})}
    assert dataset.load_qrels("notes", "judged").keys() == before.keys() | new


def test_limits_are_of_one_dataset(notes, judged):
    for path in (paths.corpus, paths.generated):
        path("more").parent.mkdir(parents=True, exist_ok=True)
        path("more").write_bytes(path("notes").read_bytes())
    for limit in ("--max-requests", "--max-cost"):
        said = judged(None, "more", "bm25", limit, "5", "--llm", "gpt-4o", "--base-url", "http://127.0.0.1:9/v1", code=2)
        assert "are limits for one dataset" in said


@pytest.mark.parametrize(("complete", "why", "anew"), [(False, "is unfinished", False), (True, "is stale: ", True)])
def test_queries_that_are_stale_or_not_all_there_are_refused_before_anything_is_paid(
    notes, judged, run_script, complete, why, anew
):
    inputs = {} if not complete else {"datasets/notes/corpus.jsonl": {"size": 1, "mtime_ns": 1, "sha256": "0"}}
    record = {"command": ["datasets/generate_queries.py", "notes"], "complete": complete, "options": {}, "inputs": inputs}
    paths.run_json(paths.generated("notes")).write_text(json.dumps(record | {"settings": {"llm": "judge"}}))
    with LLMServer(reply=grader) as server:
        said = judged(server, "bm25", code=2)
        _, _, err = run_script("datasets/parse_synthetic.py", "notes", "--llm", "judge", "--base-url", server.url)
        assert not server.requests
    for words in (said, err):
        assert f"datasets/notes_generated.jsonl {why}" in words
        assert ("datasets/generate_queries.py notes --force" in words) == anew


def test_test_queries_where_there_are_some_and_a_file_of_ones_own_is_kept(lab, judged):
    with LLMServer(reply=grader) as server:
        judged(server, "bm25", ds="tiny")
        assert dataset.load_qrels("tiny", "judged").keys() == dataset.load_qrels("tiny", "test").keys()
        paths.run_json(paths.qrels("tiny", "judged")).unlink()
        assert "is your own file, which would be overwritten" in judged(server, "bm25", ds="tiny", code=2)


def test_no_queries_no_recorded_answers_and_options_of_a_judge(notes, judged, run_script, tiny_encoder):
    code, _, err = run_script("evaluate.py", "bm25", "notes", "--llm", "judge")
    assert (code, "--llm, --batch, --dry-run and --pointwise are for --split judged" in err) == (2, True)
    assert "there are no recorded answers for notes" in judged(None, "bm25", "--llm", "replay", code=2)
    recorded = rows(paths.recorded("pydocs") / "preferences.jsonl")[0]["query"]
    make_dataset(
        paths.dataset("pydocs"), [(f"p{n:02}", f"{recorded} {n}" if n < 19 else recorded, f"Passage {n}") for n in range(20)]
    )
    assert "replay has judged no passage of any of the 4 queries of pydocs" in judged(
        None, "bm25", "--llm", "replay", ds="pydocs", code=2
    )
    with LLMServer(reply=grader) as server:
        out = judged(server, "bm25", "--dry-run")
        assert "estimate" in out
        assert not server.requests
    assert not paths.judged("notes").exists()
    assert not paths.qrels("notes", "judged").exists()
    paths.generated("notes").unlink()
    err = judged(None, "bm25", "--llm", "judge", code=2)
    assert "no datasets/notes/qrels/test.tsv, and the tenth of the queries without judgements" in err
    assert "datasets/generate_queries.py notes" in err


def test_an_answer_that_is_none_is_no_judgement(notes, judged):
    """The passages of one query stay unjudged, which is counted; the query is left out."""
    worst = min(int(q[1:]) for q in training.load("notes", None).reserved)
    with LLMServer(reply=lambda body: "I cannot say." if shown(prompt_of(body))[0] == worst else grader(body)) as server:
        assert "rows failed" in judged(server, "bm25", "--max-failure-rate", "0", code=1)
        assert not paths.qrels("notes", "judged").exists()
        out = judged(server, "bm25", "--max-failure-rate", "0.5")
    assert f"g{worst:02}" not in dataset.load_qrels("notes", "judged")
    assert "1 of " in out
    assert "queries have no judgement; they are left out" in out


def test_replies_of_a_ledger_judge_again_what_they_judged(notes, judged):
    """What the ledger lacks stays unjudged, is counted, and is not relevant."""
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
    before = dataset.load_qrels("notes", "judged")
    ledger = notes / "kept.jsonl"
    replies = rows(paths.judged_ledger("notes"))
    lost = replies.pop()["item"]
    write_jsonl(ledger, replies)
    for path in (paths.judged("notes"), paths.qrels("notes", "judged"), paths.run_json(paths.qrels("notes", "judged"))):
        path.unlink()
    out = judged(None, "bm25", "--llm", "replay:judge", "--ledger", ledger)
    after = dataset.load_qrels("notes", "judged")
    query = next(q for q in before if before[q] != after.get(q))
    assert f"topic {query[1:]}?" in lost[0]
    assert {q: found for q, found in before.items() if q != query} == {q: found for q, found in after.items() if q != query}
    assert after.get(query, {}) == {p: g for p, g in before[query].items() if Corpus("notes").first_id(p) not in lost[1:]}
    assert "1 requests have no recorded answer" in out
    made = json.loads(paths.result("bm25", "notes", "judged", ".json").read_text())
    top = {q: [p for p, _ in hits[:10]] for q, hits in bm25.run(Corpus("notes"), training.load("notes", None).reserved, 10)}
    hits = [p in after[q] for q in after for p in top[q]]
    assert made["unjudged"] == pytest.approx(1 - sum(hits) / len(hits))
    assert made["unjudged"] > 0


def test_recorded_rankings_judge_the_queries_that_they_have(notes, judged):
    kept = training.load("notes", None).reserved
    query = min(kept)
    top = [p for p, _ in dict(bm25.run(Corpus("notes"), {query: kept[query]}, 10))[query]]
    relevant = next(p for p in top if int(p[1:]) > 3)  # not one of the repeated texts
    others = [[p] for p in top if p != relevant]
    recorded = paths.dataset("notes") / "recorded" / "preferences.jsonl"
    write_jsonl(recorded, [{"query": kept[query], "ranking": [[relevant], *others]}])
    out = judged(None, "bm25", "--llm", "replay")
    found = dataset.load_qrels("notes", "judged")
    assert found == {query: {p: int(p == relevant) for p in found[query]}}
    assert set(top) <= set(found[query])
    assert "judged by an LLM (recorded answers), not by a person" in out
    assert f"{len(kept) - 1} of {len(kept)} queries have no judgement" in out
    assert "datasets/notes/recorded/preferences.jsonl" in lineage.load_record(paths.judged("notes"))["inputs"]


def test_the_model_card_says_who_judged(stage1, run_script, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with LLMServer(
        reply=lambda body: "\n".join(f"{n}: {n % 4}" for n in range(1, prompt_of(body).count("Passage ") + 1))
    ) as server:
        given = ["--split", "judged", "--llm", "judge", "--base-url", server.url, *FAST]
        code, _, err = run_script("evaluate.py", SFT, "tiny", "--ks", "1,10", *given)
    assert code == 0, err
    scores = [line for line in (stage1 / "README.md").read_text().splitlines() if line.startswith("| tiny | judged |")]
    assert len(scores) == 5
    assert all("judged by judge, an LLM" in line for line in scores)


def test_a_limit_and_a_kill_in_the_middle_lose_and_repeat_nothing(lab, judged, run_script, monkeypatch):
    """The same judgements as of an undisturbed run, and no request twice but what was in flight."""
    with LLMServer(reply=grader) as server:
        judged(server, "bm25", ds="tiny")
        expected, total = paths.qrels("tiny", "judged").read_bytes(), len(server.requests)
    for path in (paths.qrels("tiny", "judged"), paths.judged("tiny"), paths.judged_ledger("tiny")):
        path.unlink()
    with LLMServer(reply=grader, latency=0.3) as server:
        assert "stopped at --max-requests 1" in judged(server, "bm25", "--max-requests", "1", ds="tiny", code=1)
        assert len(server.requests) == 1
        command = [sys.executable, ROOT / "evaluate.py", "bm25", "tiny", "--split", "judged", "--ks", "1,5,10"]
        command += ["--llm", "judge", "--base-url", server.url, "--concurrency", "1"]
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
        wait_for(lambda: len(server.requests) >= 3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not paths.qrels("tiny", "judged").exists()
        judged(server, "bm25", ds="tiny")
        assert total <= len(server.requests) <= total + 1
    assert paths.qrels("tiny", "judged").read_bytes() == expected
    assert len(rows(paths.judged("tiny"))) == total


def test_a_full_disk_loses_and_repeats_nothing(notes, judged):
    """Whichever file the disk has no room for is named; no reply that arrived before is asked for again."""
    files = [paths.judged_ledger("notes"), paths.judged("notes"), paths.qrels("notes", "judged")]
    with LLMServer(reply=grader) as server:
        judged(server, "bm25")
        expected, total = files[2].read_bytes(), len(server.requests)
        for number, path in enumerate(files):  # what is written after it has to be written again
            size = path.stat().st_size // 2
            for later in files[number:]:
                later.unlink()
            with file_size_limit(size):
                said = judged(server, "bm25", code=1)
            # The record of the rows is larger than the judgements.
            named = paths.shown(path if path != files[2] else paths.run_json(files[1]))
            assert re.search(rf"failed: cannot write {named}(.run.json)?: (File too large|No space left)", said)
            judged(server, "bm25")
            assert files[2].read_bytes() == expected
            if not number:
                assert total <= len(server.requests) - total <= 2 * total  # those in flight, of which no trace was kept
                asked = len(server.requests)
        assert len(server.requests) == asked
        with file_size_limit(0):
            assert "failed: cannot write .locks/" in judged(server, "bm25", code=1)


DOCUMENTS = {  # by what status says is missing: the command that makes it
    "datasets/notes_generated.jsonl": "datasets/generate_queries.py notes",
    "stage2/mine_notes_top100.jsonl": "retrieval.py {model} notes --fuse --name mine",
    "stage2/mine_notes_judgements.jsonl": "stage2/parse_comparison.py notes --graded --model {model} --name mine",
    "output/mine-sft-notes": "train_stage1.py {model} notes --judgements llm --name mine",
    "results/mine-sft_notes_judged.json": "evaluate.py bm25 {model} mine-sft notes --split judged",
}


@pytest.mark.parametrize("log", [False, True])
def test_status_leads_from_documents_to_a_measured_retriever(tmp_path, monkeypatch, run_script, tiny_encoder, log):
    """Each output is made as its stage would make it; then it is stale once the documents change."""
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    write_jsonl(paths.corpus("notes"), [{"_id": "a", "text": "red apples"}])
    if log:
        write_jsonl(paths.queries("notes"), [{"_id": f"q{n}", "text": f"what is red {n}"} for n in range(9)])
    options = argparse.Namespace(model=str(tiny_encoder))
    before, steps = paths.corpus("notes"), list(DOCUMENTS)[1 if log else 0 :]
    for n, name in enumerate(steps):
        code, out, err = run_script(STATUS, "notes")
        assert code == 0, err
        shown = [line.split()[:2] for line in out.splitlines() if not line.startswith("next")]
        if n > 1 - log:  # before there is anything of an encoder, status names the README's
            states = ["fresh"] * (n + 1) + ["missing"] * (len(steps) - n)
            assert [state for state, *_ in filter(None, shown)] == states
            assert NEXT.findall(out) == [f"python {DOCUMENTS[name].format(model=tiny_encoder)}"]
        elif name.startswith("datasets"):
            assert NEXT.findall(out) == [f"python {DOCUMENTS[name]}"]
        else:
            assert NEXT.findall(out) == ["python retrieval.py e5 notes --fuse"]
        output = tmp_path / name
        output.parent.mkdir(exist_ok=True, parents=True)
        if "output" in name:
            output.mkdir()
        else:
            write_jsonl(output, [{"query_id": "g", "query": "what is red", "kind": "question", "passage_id": "a"}])
        record = lineage.Record(options)
        record.reads(before)
        record.write(output)
        before = paths.run_json(output)
    code, out, _ = run_script(STATUS, "notes")
    assert code == 0
    assert "mine is complete" in out
    write_jsonl(paths.corpus("notes"), [{"_id": "a", "text": "green apples"}])
    code, out, _ = run_script(STATUS, "notes")
    assert f"stale    {steps[0]}" in out
    paths.qrels("notes", "test").parent.mkdir()
    paths.qrels("notes", "test").write_text("q0\ta\t1\n")
    assert "missing  results/mine-sft_notes_test.json" in run_script(STATUS, "notes")[1]
