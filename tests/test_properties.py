"""What holds for any input: the JSONL layer, the ledger, path names, the padding of measures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syntriever.errors import BadInput
from syntriever.files import jsonl, paths
from syntriever.llm.ledger import Ledger, Reply, Request
from syntriever.report import metrics

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=6)


@pytest.fixture(autouse=True)
def subnormal_floats():
    torch.set_flush_denormal(False)  # a model that another test has loaded turned them off


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "rows.jsonl"


@given(rows=ROWS, bom=st.booleans(), newline=st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \n"]))
def test_rows_come_back_as_they_were(path, rows, bom, newline):
    lines = [jsonl.dumps(row) for row in rows]
    assert all(line.count(b"\n") == 1 for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" * bom + b"".join(line[:-1] + newline for line in lines))
    assert list(jsonl.read(path)) == rows


@given(data=st.binary() | st.text('{}[]":,\n\r01e.-atrufn\\ ').map(str.encode))
def test_any_bytes_are_rows_or_named_with_their_line(path, data):
    path.write_bytes(data)
    try:
        rows = list(jsonl.read(path, {"query_id": str}))
    except BadInput as error:
        number = int(str(error).removeprefix(f"{paths.shown(path)}:").partition(":")[0])
        assert 1 <= number <= data.count(b"\n") + 1
    else:
        assert all(json.loads(jsonl.dumps(row)) == row for row in rows)


@given(rows=ROWS, share=st.floats(0, 1))
def test_a_file_cut_anywhere_is_mended_to_its_complete_rows(path, rows, share):
    raw = b"".join(map(jsonl.dumps, rows))
    cut = round(share * len(raw))
    path.write_bytes(raw[:cut])
    jsonl.mend(path)
    ends = [sum(len(jsonl.dumps(row)) for row in rows[: n + 1]) for n in range(len(rows))]
    assert list(jsonl.read(path)) == rows[: sum(end - 1 <= cut for end in ends)]
    assert path.read_bytes()[-1:] in (b"", b"\n")


REPLIES = st.builds(
    Reply, st.text(), st.sampled_from(["", "refusal", "truncated"]), st.sampled_from(["stop", "length"]), st.integers(0, 9)
)


@given(
    added=st.lists(st.tuples(st.integers(0, 3), REPLIES, st.sampled_from([10, 20])), max_size=8),
    lost=st.integers(0, 40),
    limit=st.sampled_from([10, 20]),
    retry_failed=st.booleans(),
)
def test_a_ledger_cut_anywhere_answers_what_it_holds(path, added, lost, limit, retry_failed):
    """The last reply to a request counts; a cut loses at most the row it falls into."""
    requests = [Request("cot", ("q",), f"prompt {n}", 0.7, 10) for n in range(4)]
    keys, file = [request.key("m") for request in requests], path.with_name("ledger.jsonl")
    file.unlink(missing_ok=True)
    ledger, ends = Ledger(file), [0]
    for n, reply, tokens in added:
        ledger.add(keys[n], dataclasses.replace(requests[n], max_tokens=tokens), "m", reply)
        ledger.sync()
        ends.append(file.stat().st_size)
    ledger.close()
    size = max(0, ends[-1] - lost)
    with file.open("r+b") as opened:
        opened.truncate(size)
    kept = {n: (reply, tokens) for (n, reply, tokens), end in zip(added, ends[1:], strict=True) if end - 1 <= size}
    ledger = Ledger(file, retry_failed)
    for n, key in enumerate(keys):
        reply, tokens = kept.get(n, (None, 0))
        if reply and reply.reason and (retry_failed or (reply.finish_reason == "length" and tokens < limit)):
            reply = None
        assert ledger.get(key, limit) == reply
    ledger.close()


@given(name=st.text() | st.sampled_from(["../x", "/x", "a/b", "..", ".", "a\0b", "-x", "CON", "a" * 101, "x\n"]))
def test_no_name_leads_out_of_its_folder(name):
    makers = [
        paths.dataset,
        paths.synthetic,
        paths.model_output,
        lambda n: paths.top(n, n),
        lambda n: paths.result(n, n, n, ".json"),
    ]
    for make in makers:
        try:
            made = make(name)
        except BadInput:
            continue
        assert made.resolve().parent == made.parent
        assert Path(paths.home()) in made.parents
        assert name == name.strip()
        assert set(name).isdisjoint("/\\\0\n")


RUNS = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3"]),
    st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.floats(-9, 9)),
    max_size=3,
)
QRELS = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3"]),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 3), min_size=1),
    min_size=1,
    max_size=3,
)


@given(qrels=QRELS, run=RUNS)
def test_a_query_without_results_counts_zero_and_changes_no_other(qrels, run):
    whole = metrics.evaluate(qrels, run, (1, 3))
    for name, values in whole.items():
        assert values.keys() == qrels.keys(), name
        assert all(0 <= value <= 1 for value in values.values())
        for query in qrels:
            less = metrics.evaluate(qrels, {other: hits for other, hits in run.items() if other != query}, (1, 3))[name]
            assert less == {**values, query: 0.0}
