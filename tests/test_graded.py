"""Training on graded judgements: each loss against plain loops, the loss of a batch, the choice of weights, the commands."""

import json
import math
import random
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAST, SFT, digest, library, log_of, write_jsonl
from safetensors.torch import load_file

from syntriever.data import training
from syntriever.data.corpus import Corpus
from syntriever.encode import models
from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.train import graded, journal, losses

TINY = SFT.removesuffix("-sft")
TAU = 0.05


def log_sum_exp(values):
    values = list(values)
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def mean(values):
    return sum(values) / len(values) if values else 0.0


def case(seed, rows=5, columns=6):
    """Scores, grades and which are judged: a row of one passage, one of equal grades and an empty one among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3
    grades = torch.randint(0, 4, (rows, columns), generator=generator).double()
    judged = torch.rand(rows, columns, generator=generator) > 0.3
    judged[0], judged[1] = False, torch.arange(columns) == 2
    grades[2] = 1.0
    return scores.requires_grad_(), grades, judged


# --- losses


@pytest.mark.parametrize("seed", range(4))
def test_listwise_cross_entropy_is_what_loops_make_of_it(seed):
    scores, grades, judged = case(seed)
    costs = []
    for row in range(len(scores)):
        own = [k for k in range(scores.shape[1]) if judged[row, k]]
        if len({float(grades[row, k]) for k in own}) < 2:
            continue
        teacher = [float(grades[row, k]) / 0.5 for k in own]
        all_scores = log_sum_exp(float(scores[row, k].detach()) for k in own)
        costs.append(
            -sum(
                math.exp(t - log_sum_exp(teacher)) * (float(scores[row, k].detach()) - all_scores)
                for t, k in zip(teacher, own, strict=True)
            )
        )
    made = losses.listwise_cross_entropy(scores, grades / 0.5, judged)
    assert float(made.detach()) == pytest.approx(mean(costs), rel=1e-9)
    assert costs
    assert torch.autograd.gradcheck(lambda s: losses.listwise_cross_entropy(s, grades / 0.5, judged), scores)


@pytest.mark.parametrize("seed", range(4))
def test_plackett_luce_over_groups_is_what_loops_make_of_it(seed):
    scores, grades, judged = case(seed)
    costs = []
    for row in range(len(scores)):
        own, of_row = [k for k in range(scores.shape[1]) if judged[row, k]], []
        for k in own:
            lower = [float(scores[row, j].detach()) for j in own if grades[row, j] < grades[row, k]]
            if lower:
                mine = float(scores[row, k].detach())
                of_row.append(log_sum_exp([mine, *lower]) - mine)
        costs += [mean(of_row)] if of_row else []
    assert float(losses.plackett_luce_groups(scores, grades, judged).detach()) == pytest.approx(mean(costs), rel=1e-9)
    assert costs
    assert torch.autograd.gradcheck(lambda s: losses.plackett_luce_groups(s, grades, judged), scores)


def test_plackett_luce_of_a_strict_order_is_the_likelihood_of_that_order():
    scores = torch.tensor([[2.0, -1.0, 0.5, 1.0]], dtype=torch.float64)
    order = [3, 0, 2, 1]  # best first
    grades = torch.tensor([[2.0, 0.0, 1.0, 3.0]])
    likelihood = 1.0
    for at in range(3):
        left = [math.exp(float(scores[0, k])) for k in order[at:]]
        likelihood *= left[0] / sum(left)
    made = losses.plackett_luce_groups(scores, grades, torch.ones(1, 4, dtype=torch.bool))
    assert float(made) == pytest.approx(-math.log(likelihood) / 3)


@pytest.mark.parametrize("seed", range(4))
def test_graded_contrast_is_what_loops_make_of_it(seed):
    scores, grades, judged = case(seed, columns=8)
    relevant, ignored = judged & (grades >= 2), ~judged & (grades == 1)
    costs = []
    for row in range(len(scores)):
        mine = [k for k in range(scores.shape[1]) if relevant[row, k]]
        others = [float(scores[row, k].detach()) for k in range(scores.shape[1]) if not relevant[row, k] and not ignored[row, k]]
        own = [float(scores[row, k].detach()) for k in mine]
        costs += [mean([log_sum_exp([one, *others]) - one for one in own])] if own else []
    assert float(losses.graded_contrast(scores, relevant, ignored).detach()) == pytest.approx(mean(costs), rel=1e-9)
    assert torch.autograd.gradcheck(lambda s: losses.graded_contrast(s, relevant, ignored), scores)


def test_losses_of_nothing_are_zero_with_a_gradient_of_zero():
    scores = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(3, 4, dtype=torch.bool)
    for made in (
        losses.listwise_cross_entropy(scores, torch.ones(3, 4), ~none),
        losses.plackett_luce_groups(scores, torch.ones(3, 4), ~none),
        losses.graded_contrast(scores, none, none),
    ):
        (gradient,) = torch.autograd.grad(made, scores)
        assert float(made.detach()) == 0
        assert gradient.abs().sum() == 0


def test_near_positives_by_hand():
    cosines = torch.tensor([[0.80, 0.77, 0.75, 0.90, 0.40], [0.1, 0.2, 0.3, 0.4, 0.5]])
    relevant = torch.tensor([[True, False, False, False, True], [False] * 5])
    judged = torch.tensor([[True, False, False, True, True], [False] * 5])
    near = losses.near_positives(cosines, relevant, judged, 0.95)  # from .76 on; what is judged is a negative all the same
    assert near.tolist() == [[False, True, False, False, False], [False] * 5]


# --- the whole loss of a batch


class FakeBank:
    def __init__(self, vectors, views, top):
        self.views, self.top = views, top
        self.embeddings = types.SimpleNamespace(rows=lambda positions: vectors[positions])


@pytest.mark.parametrize(
    ("regularised", "dim", "doubted", "most"),
    [(False, 6, False, 3), (True, 6, False, 3), (True, 2, True, 3), (False, 6, False, 2)],
)
def test_the_loss_of_a_batch_is_what_loops_make_of_it(regularised, dim, doubted, most, monkeypatch):
    """What is compared with the trained embeddings is cut to `dim`; the teachers are not. Of a doubted judge only the known
    passages are positives, and its other relevant ones are no negatives. Beyond `most` judged passages of a query none is
    encoded, and a relevant one is no negative all the same."""
    monkeypatch.setattr(graded, "MOST", most)
    rng = np.random.default_rng(3)

    def unit(*shape):
        made = rng.normal(size=shape) + 1.5
        return (made / np.linalg.norm(made, axis=-1, keepdims=True)).astype(np.float32)

    start_passages, start_queries = unit(12, 6), unit(3, 6)
    judged = graded.Judged(
        ["a", "b", "c"],
        ["a", "b", "c"],
        np.array([[4, 7, 1], [2, 4, -1], [9, 11, 0]]),
        np.array([[2.5, 0, 1 if most > 2 else 2], [3, 2, 0], [1, 0, 0]], np.float32),
        np.zeros((3, 3), np.float32),
        known := np.array([7, 4, 5]),  # the last one was not judged
        doubted,
    )
    top = np.array([[4, 5, 6], [2, 8, 4], [1, 1, 3]])
    args = types.SimpleNamespace(temperature=TAU, loss="listwise", contrast_weight=0.7, corpus_weight=0.4, beta=0.2)
    teacher = judged.grades / 0.5

    def spread(scores, start):
        return (scores - start).square().mean()

    regulariser = spread if regularised else None
    rows = [2, 0, 1]
    # Texts of the batch, in any order: passages 4 and 0 to 11 as they come, then the queries.
    passages = [9, 4, 11, 0, 7, 1, 2] if most > 2 else [9, 4, 11, 7, 2]
    place = {position: at for at, position in enumerate(passages)}
    embeddings = torch.from_numpy(np.concatenate([unit(len(passages), 6), unit(3, 6)])).double().requires_grad_()
    labels = torch.tensor(
        [[len(passages) + r, *(place.get(p, -1) for p in judged.positions[r, :most].tolist()), r] for r in rows]
    )
    loss = graded.make_loss(args, judged, teacher, FakeBank(start_passages, start_queries, top), regulariser)
    total, parts = losses.at_prefixes(loss, [dim])(embeddings.float(), labels)

    made, frozen = (all_[:, :dim] for all_ in (embeddings.detach().numpy(), start_passages))
    made, frozen = (cut / np.linalg.norm(cut, axis=1, keepdims=True) for cut in (made, frozen))
    order, contrast, corpus = [], [], []
    ours, theirs = [], []
    for r in rows:
        query = made[len(passages) + r]
        own = [(p, float(g)) for p, g in zip(judged.positions[r], judged.grades[r], strict=True) if p >= 0]
        teach = [g / 0.5 for _, g in own[:most]]
        student = [float(query @ made[place[p]]) / TAU for p, _ in own[:most]]
        if len(set(teach)) > 1:
            order.append(
                -sum(math.exp(t - log_sum_exp(teach)) * (s - log_sum_exp(student)) for t, s in zip(teach, student, strict=True))
            )
        called = {p for p, g in own if g >= 2}
        seen = {p for p, _ in own}
        relevant = {known[r]} if doubted and known[r] in seen else called
        for candidates, vector, costs in (
            (passages, lambda p: made[place[p]], contrast),
            (sorted({*top.ravel().tolist(), *passages}), lambda p: frozen[p], corpus),
        ):
            there = sorted(relevant & set(candidates))
            if not there:
                continue
            nearest = max(float(start_queries[r] @ start_passages[p]) for p in there)
            negatives = [
                p
                for p in candidates
                if p not in relevant | called and (p in seen or float(start_queries[r] @ start_passages[p]) < 0.95 * nearest)
            ]
            against = [float(query @ vector(p)) / TAU for p in negatives]
            mine = [float(query @ vector(p)) / TAU for p in there]
            costs.append(mean([log_sum_exp([one, *against]) - one for one in mine]))
        ours += [float(query @ made[place[p]]) / TAU for p in sorted(passages)]
        theirs += [float(start_queries[r] @ start_passages[p]) / TAU for p in sorted(passages)]
    wanted = mean(order) + 0.7 * (mean(contrast) + 0.4 * mean(corpus))
    if regularised:
        wanted += 0.2 * mean([(a - b) ** 2 for a, b in zip(ours, theirs, strict=True)])
    assert len(contrast) == 2  # the third query has nothing of grade 2
    assert float(parts["corpus"]) == pytest.approx(mean(corpus), rel=1e-4)
    assert float(total) == pytest.approx(wanted, rel=1e-4)


# --- what is read


@pytest.fixture
def judge(home, docstrings):
    """Grades of four passages for each training query of `tiny`: its own 3, the next ones 1, 0.5 and 0."""
    train = docstrings[: len(docstrings) * 6 // 10]
    rows = []
    for number, (name, query, _) in enumerate(train):
        others = [train[(number + step) % len(train)][0] for step in (1, 2, 3)]
        grades = dict(zip([name, *others], (3.0, 1, 0.5, 0), strict=True))
        rows.append({"query_id": f"q-{name}", "query": query, "grades": grades})
    write_jsonl(paths.judgements(TINY, "tiny"), rows)
    return rows


def loaded(gold=False, hold_out=True):
    corpus = Corpus("tiny")
    return graded.load(paths.judgements(TINY, "tiny"), training.load("tiny", None), corpus, gold, hold_out), corpus


def test_a_tenth_is_held_out_by_text_and_the_rest_is_as_it_was_judged(judge):
    (train, held), corpus = loaded()
    assert sorted([*train.names, *held.names]) == sorted(row["query_id"] for row in judge)
    assert held.names == sorted(row["query_id"] for row in judge if training.fold(" ".join(row["query"].split())) == 0)
    assert 0 < len(held.names) < 12
    grades = {row["query_id"]: row["grades"] for row in judge}
    for name, positions, given in zip(train.names, train.positions, train.grades, strict=True):
        assert {corpus.id(p): g for p, g in zip(positions, given.tolist(), strict=True)} == grades[name]
    (everything, nothing), _ = loaded(hold_out=False)
    assert (len(everything.names), nothing.names) == (len(judge), [])


def test_where_all_queries_would_be_held_out_all_train(judge):
    (_, held), _ = loaded()
    write_jsonl(paths.judgements(TINY, "tiny"), [row for row in judge if row["query_id"] in held.names])
    (train, nothing), _ = loaded()
    assert (train.names, nothing.names) == (held.names, [])


def test_both_gives_gold_passages_the_best_grade_and_judged_ones_keep_theirs(judge, home):
    judge[0]["grades"] = {judge[1]["query_id"][2:]: 2.0, judge[2]["query_id"][2:]: 0.0}  # its gold passage was not shown
    write_jsonl(paths.judgements(TINY, "tiny"), judge[:1])
    (train, _), corpus = loaded(gold=True, hold_out=False)
    assert len(train.names) == 36  # gold alone trains, too
    row = train.names.index(judge[0]["query_id"])
    found = {corpus.id(p): g for p, g in zip(train.positions[row], train.grades[row].tolist(), strict=True) if p >= 0}
    assert found == {judge[0]["query_id"][2:]: 3.0, **judge[0]["grades"]}
    assert train.relevant[row] == {corpus.position(judge[0]["query_id"][2:]), corpus.position(judge[1]["query_id"][2:])}


@pytest.mark.parametrize("grade", [3.5, -1, "2", True, None])
def test_a_grade_that_is_none_is_named_with_its_line(judge, grade):
    judge[4]["grades"] = {judge[0]["query_id"][2:]: grade}
    write_jsonl(paths.judgements(TINY, "tiny"), judge)
    with pytest.raises(BadInput, match=r"_judgements\.jsonl:5: the grade of .* not a number from 0 to 3"):
        loaded()


def test_a_passage_that_the_corpus_lacks_is_named_with_its_line(judge):
    judge[2]["grades"] = {"nowhere": 1}
    write_jsonl(paths.judgements(TINY, "tiny"), judge)
    with pytest.raises(BadInput, match=r":3: .* has no passage 'nowhere'"):
        loaded()


def test_equal_texts_are_one_passage_with_the_best_grade_and_one_query(judge, home, docstrings):
    rows = [json.loads(line) for line in paths.corpus("tiny").read_text().splitlines()]
    first = rows[0]["_id"]
    write_jsonl(paths.corpus("tiny"), [*rows, {"_id": "again", "title": "", "text": f" {rows[0]['text']} "}])
    judge[0]["grades"] = {first: 1.0, "again": 2.5, rows[1]["_id"]: 0.0}
    write_jsonl(paths.judgements(TINY, "tiny"), judge)
    (train, held), corpus = loaded(hold_out=False)
    row = train.names.index(judge[0]["query_id"])
    assert dict(zip(train.positions[row].tolist(), train.grades[row].tolist(), strict=True)) == {0: 2.5, 1: 0.0, -1: 0.0}


# --- how much the judge is trusted


def table(positions, grades, known):
    names = [str(n) for n in range(len(positions))]
    grades = np.array(grades, np.float32)
    return graded.Judged(names, names, np.array(positions), grades, grades, np.array(known))


def test_a_judge_that_knows_is_trusted_alone(capsys):
    judged = table([[0, 1, 2], [3, 4, 5]], [[3, 0, 0], [0, 3, 0]], [0, 4])
    start = np.array([[0.1, 5, 9], [5, 0.2, 9]], np.float32)
    assert graded.trust(start, judged) == (None, False)
    assert "is 0.333 by the encoder, 1.000 by the judge" in capsys.readouterr().out


def test_a_weak_judge_counts_beside_the_encoder(capsys):
    # The judge cannot tell the first two apart, and the encoder is sure of the third.
    judged = table([[0, 1, 2], [3, 4, 5]], [[1, 1, 0], [1, 1, 0]], [0, 3])
    start = np.array([[0.5, 0.1, 1.0], [0.5, 0.1, 1.0]], np.float32)
    weight, doubted = graded.trust(start, judged)
    assert weight == 1.0  # .5 leaves a tie with the third
    assert "0.500 by the encoder, 0.667 by the judge, 1.000 by the encoder + 1 times the judge" in capsys.readouterr().out
    assert not doubted  # the encoder breaks its ties in the same way


def test_a_judge_that_finds_less_than_the_encoder_is_doubted(capsys):
    # It puts one of three passages right, and the encoder two.
    judged = table([[0, 1, 2]] * 3, [[3, 2, 0], [1, 2, 0], [1, 2, 0]], [0, 0, 0])
    start = np.array([[1.0, 1.5, 0.0], [2.0, 1.0, 0.0], [2.0, 0.0, 1.0]], np.float32)
    assert graded.trust(start, judged) == (0.5, True)
    assert "is 0.833 by the encoder, 0.667 by the judge, 0.889 by the encoder + 0.5 times" in capsys.readouterr().out


def test_a_judge_that_adds_nothing_is_warned_of(capsys):
    judged = table([[0, 1], [2, 3]], [[0, 3], [0, 3]], [0, 2])
    start = np.array([[2.0, 1.0], [2.0, 1.9]], np.float32)
    assert graded.trust(start, judged) == (0.0, True)
    assert "warning: this judge adds nothing" in capsys.readouterr().out


def with_odds(known, odds):
    judged = table([[0, 1, -1], [2, 3, 4]], [[2.5, 1, 0], [2.2, 2, 1]], known)
    return replace(judged, signal=np.array(odds, np.float32))


def test_log_odds_are_added_to_the_encoder_where_nothing_is_known(capsys):
    start = np.array([[4, 2, 50], [0, 3, 6]], np.float32)  # within a query 1 and 2.449 from the mean, an absent one aside
    sure = with_odds([-1, -1], [[9, -9, 0], [5, 0, -5]])
    assert graded.trust(start, sure) == (1.0, False)
    assert "its log-odds 6.54, the encoder's scores 1.72" in capsys.readouterr().out
    assert (sure.relevant, sure.unsure) == ([{0}, {2, 3}], [set(), set()])


def test_yes_of_a_judge_that_is_less_sure_than_the_encoder_makes_no_positive(capsys):
    start = np.array([[4, 2, 50], [0, 3, 6]], np.float32)
    weak = with_odds([-1, -1], [[0.2, -0.2, 0], [0.5, 0, -0.5]])
    weight, weak.doubted = graded.trust(start, weak)
    assert (weight, weak.doubted) == (1.0, True)
    assert "warning: this judge is less sure than the encoder" in capsys.readouterr().out
    assert (weak.relevant, weak.unsure) == ([set(), set()], [{0}, {2, 3}])
    # Beside gold passages, which have the highest grade, it is as it was; nor does a known one need its yes.
    assert graded.trust(start, replace(weak, gold=True)) == (None, False)
    assert replace(weak, gold=True).relevant == [{0}, {2, 3}]
    assert replace(weak, known=np.array([-1, 4])).relevant == [set(), {4}]


def test_without_a_known_passage_the_grades_are_the_teacher(capsys):
    for known in (-1, 7):  # none, or one that is not among the judged
        assert graded.trust(np.zeros((1, 2), np.float32), table([[0, -1]], [[1, 0]], [known])) == (None, False)
    assert not capsys.readouterr().out


# --- the commands


def run_stage1(run_script, encoder, *more, code=0):
    found, out, err = run_script("train_stage1.py", encoder, "tiny", "--judgements", "llm", "--epochs", "2", *FAST, *more)
    assert found == code, err
    return err if code else out


def test_stage1_learns_from_grades_alone(judge, home, tiny_encoder, run_script):
    (paths.qrels("tiny", "train")).unlink()
    (paths.qrels("tiny", "dev")).unlink()
    _, out, _ = run_script("train_stage1.py", tiny_encoder, "tiny", "--epochs", "3", *FAST)
    assert "note:  56 training queries" not in out
    output = paths.model_output(f"{SFT}-tiny")
    made = json.loads((output / "run.json").read_text())
    assert made["options"]["judgements"] == "llm"
    assert made["options"]["lr"] == 1e-3
    assert not any("qrels/train" in name or "qrels/dev" in name for name in made["inputs"])
    steps = [row for row in log_of(output) if "order" in row]
    assert steps[-1]["order"] < steps[0]["order"]
    assert steps[-1]["contrast"] < steps[0]["contrast"]
    scores = {row["epoch"]: row["dev_ndcg@10"] for row in log_of(output) if "dev_ndcg@10" in row}
    assert list(scores) == [0, 1, 2, 3]
    kept = [scores[3]] if "the last epoch stays" in out else scores.values()
    assert made["results"]["dev_ndcg_at_10"] >= max(kept)
    assert "--split" not in out.splitlines()[-1]  # it has a test split


@pytest.mark.parametrize("loss", ["listwise", "plackett-luce"])
@pytest.mark.parametrize("judgements", ["llm", "both"])
def test_both_stages_train_with_every_loss_on_grades(judge, home, tiny_encoder, run_script, loss, judgements):
    more = ["--judgements", judgements, "--loss", loss]
    out = run_stage1(run_script, tiny_encoder, *more)
    assert "next:  python retrieval.py" in out
    write_jsonl(paths.judgements(SFT, "tiny"), judge)
    code, out, err = run_script("train_stage2.py", SFT, "tiny", *more, *FAST)
    assert code == 0, err
    log = log_of(paths.model_output(f"{TINY}-final-tiny"))
    assert {"order", "contrast", "corpus", "kl"} <= next(row.keys() for row in log if "loss" in row)


def test_grades_are_asked_for_by_their_command(home, tiny_encoder, run_script):
    err = run_stage1(run_script, tiny_encoder, code=2)
    assert f"stage2/{TINY}_tiny_judgements.jsonl is not there. Run: " in err
    assert f"parse_comparison.py tiny --graded --model {tiny_encoder}" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--loss", "snn"], "--loss snn does not go with --judgements llm"),
        (["--judgements", "gold", "--loss", "listwise"], "--loss listwise does not go with --judgements gold"),
        (["--grade-temperature", "0"], "--grade-temperature must be positive"),
    ],
)
def test_options_that_do_not_go_together_are_refused(judge, tiny_encoder, run_script, more, words):
    assert words in run_stage1(run_script, tiny_encoder, *more, code=2)


@pytest.mark.parametrize("more", [[], ["--lora", "4"]])
def test_a_run_on_grades_resumes_to_the_same_bits(judge, home, tiny_encoder, run_script, monkeypatch, more):
    run_stage1(run_script, tiny_encoder, "--seed", "7", *more)
    output = paths.model_output(f"{SFT}-tiny")
    calm, log = digest(output / "model.safetensors"), [row.get("loss") for row in log_of(output)]
    for stop in (1, 3):
        real, calls = journal.Journal.step, []

        def step(self, *given, real=real, calls=calls, stop=stop):
            real(self, *given)
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(journal.Journal, "step", step)
        run_stage1(run_script, tiny_encoder, "--seed", "7", *more, "--resume", "--save-minutes", "0", code=130)
        monkeypatch.setattr(journal.Journal, "step", real)
    run_stage1(run_script, tiny_encoder, "--seed", "7", *more, "--resume")
    assert digest(output / "model.safetensors") == calm
    assert [row.get("loss") for row in log_of(output)] == log
    assert not (output / journal.START).exists()


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("more", [[], ["--lora", "4"]])
@pytest.mark.parametrize("best", ["start", "average", "last"])
def test_untrained_trained_and_averaged_weights_are_candidates(judge, home, tiny_encoder, run_script, monkeypatch, best, more):
    scores = {"start": [0.9, 0.1, 0.2, 0.3], "average": [0.1, 0.2, 0.3, 0.9], "last": [0.1, 0.2, 0.9, 0.3]}

    def score_as(means):
        """Scores of two queries each time the encoder is scored."""
        left = iter(means)
        monkeypatch.setattr(journal.DevScore, "__call__", lambda self, model: dict.fromkeys("ab", next(left)))

    score_as(scores[best])
    out = run_stage1(run_script, tiny_encoder, *more)
    found, untrained = weights(paths.model_output(f"{SFT}-tiny")), weights(tiny_encoder)
    score_as(scores["last"])
    run_stage1(run_script, tiny_encoder, *more)
    trained = weights(paths.model_output(f"{SFT}-tiny"))
    assert ("no epoch is better" in out) == (best == "start")
    changed = 0
    for name, tensor in found.items():
        start = untrained.get(name.removeprefix("0.auto_model."), tensor)
        wanted = {"start": start, "last": trained[name], "average": (start + trained[name]) / 2}[best]
        assert torch.allclose(tensor.float(), wanted.float(), atol=1e-7), name
        changed += not torch.equal(start, trained[name])
    assert changed == 12 if more else changed > len(found) / 2  # the linear layers, or most of all


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([0.1, 0.1, 0.1, -0.1], 1.0),
        *[([gain, 0.0, 0.0, 0.0], 1.0) for gain in (0.19, 0.23, 0.39, 0.46)],
        ([0.1, 0.1, 0.1, 0.0], 0.0),
        ([0.0] * 4, 1.0),
        ([-0.1] * 4, 1.0),
    ],
)
def test_the_last_epoch_stays_within_a_standard_error(judge, home, tiny_encoder, run_script, monkeypatch, gains, kept):
    """Mean .05, standard error .05; one query alone, whose mean is its standard error but for rounding; mean .075, standard
    error .025; the untrained encoder is as good, and worse."""
    start = {query: 0.5 + gain for query, gain in zip("abcd", gains, strict=True)}
    scores = iter([start, dict.fromkeys("abcd", 0.5), dict.fromkeys("abcd", 0.2)])
    monkeypatch.setattr(journal.DevScore, "__call__", lambda self, model: next(scores))
    out = run_stage1(run_script, tiny_encoder, "--epochs", "1")
    assert ("within a standard error: the last epoch stays" in out) == (kept == 1 and sum(gains) > 0)
    assert ("just as good: the last epoch stays" in out) == (not any(gains))
    record = json.loads((paths.model_output(f"{SFT}-tiny") / "run.json").read_text())
    assert record["results"]["best_epoch"] == kept
    assert record["results"]["dev_ndcg_at_10"] == pytest.approx(0.5 if kept else 0.575)


def test_held_out_queries_are_scored_by_their_own_judged_passages(judge, tiny_encoder, run_script):
    (_, held), corpus = loaded()
    args = types.SimpleNamespace(max_length=32, dev_pool=50, dev_queries=99, seed=1)
    dev = graded.held_out_score(held, corpus, args)
    model = models.load(models.resolve(str(tiny_encoder), "tiny"), "cpu")
    found = dev(model)
    model.max_seq_length = 32
    vectors = library(model, dev.texts, "document")
    for name, text, positions, given in zip(held.names, held.texts, held.positions, held.grades, strict=True):
        query = library(model, [text], "query")[0]
        order = sorted(positions, key=lambda p: -float(query @ vectors[dev.ids.index(corpus.id(p))]))
        gain = dict(zip(positions, given.tolist(), strict=True))
        dcg, best = (
            sum(gain[p] / math.log2(rank + 2) for rank, p in enumerate(ranked))
            for ranked in (order, sorted(positions, key=lambda p: -gain[p]))
        )
        assert found[name] == pytest.approx(dcg / best, abs=1e-6)


def test_held_out_queries_of_a_weak_judge_are_scored_by_their_known_passages(judge, capsys):
    (_, held), corpus = loaded()
    held.known, held.doubted = held.positions[:, 1].copy(), True
    held.known[0] = -1  # of a log
    args = types.SimpleNamespace(max_length=32, dev_pool=50, dev_queries=99, seed=1)
    dev = graded.held_out_score(held, corpus, args)
    for name, positions, grades, known in zip(held.names, held.positions, held.grades, held.known, strict=True):
        wanted = [30 * (p == known) for p in positions] if known >= 0 else [10 * g for g in grades]
        assert dev.qrels[name] == dict(zip(map(corpus.id, positions), wanted, strict=True))
    assert "by the passages they were written from, choose" in capsys.readouterr().out


def test_a_preference_file_stays_the_default_of_stage2_and_grades_alone_are_said(judge, stage1, run_script):
    write_jsonl(paths.judgements(SFT, "tiny"), judge)
    code, out, err = run_script("train_stage2.py", SFT, "tiny", *FAST)
    assert code == 0, err
    assert "judged passages" in out
    pair = {"query_id": judge[0]["query_id"], "preferred_id": judge[0]["query_id"][2:], "rejected_id": judge[1]["query_id"][2:]}
    write_jsonl(paths.preferences(SFT, "tiny"), [pair])
    _, out, _ = run_script("train_stage2.py", SFT, "tiny", *FAST)
    assert "read   1 preferences" in out


# --- which queries train


def test_which_queries_train_is_one_notion(home, docstrings):
    rows = [json.loads(line) for line in paths.queries("tiny").read_text().splitlines()]
    test, dev = docstrings[-1], docstrings[40]
    log = [{"_id": f"l-{n}", "text": f"how do I sort a list of {n} things"} for n in range(50)]
    log += [
        {"_id": "leak", "text": f"  {test[1]} "},
        {"_id": "leak2", "text": dev[1]},
        {"_id": "twice", "text": log[7]["text"] + " "},
    ]
    write_jsonl(paths.queries("tiny"), rows + log)
    written = [
        {"query_id": f"g-{i}-{n}", "query": f"written {n} for {i}", "kind": "question", "passage_id": i}
        for i, _, _ in docstrings[:20]
        for n in range(3)
    ]
    written.append({"query_id": "g-leak-0", "query": test[1], "kind": "typed", "passage_id": test[0]})
    write_jsonl(paths.generated("tiny"), written)
    gold = training.load("tiny", None)
    assert (gold.kinds, len(gold.queries)) == (["gold"], 36)
    of_log = training.load("tiny", "log")
    assert set(of_log.queries) == {f"l-{n}" for n in range(50)}
    generated = training.load("tiny", "generated")
    assert set(generated.queries) == {row["query_id"] for row in written[:-1]}
    everything = training.load("tiny", "all")
    assert everything.kinds == ["gold", "log", "generated"]
    assert len(everything.queries) == 36 + 50 + 60
    # All queries of a passage are on one side.
    for i, _, _ in docstrings[:20]:
        assert len({generated.held_out(f"g-{i}-{n}") for n in range(3)}) == 1
    # Without test judgements of its own a tenth is kept apart, by the same rule.
    paths.qrels("tiny", "test").unlink()
    assert not training.load("tiny", "log").reserved.keys() & training.load("tiny", "log").queries.keys()
    kept = training.load("tiny", "all").reserved
    assert kept
    assert all(training.fold(docstring_key(q, everything)) == training.TEST for q in kept if q in everything.queries)


def docstring_key(query, train):
    return train.sources.get(query) or " ".join(train.queries[query].split())


def test_documents_alone_say_the_three_ways(home, run_script):
    paths.queries("tiny").unlink()
    for qrels in paths.qrels("tiny", "train").parent.glob("*.tsv"):
        qrels.unlink()
    for command in (["retrieval.py", "minilm", "tiny"], ["datasets/parse_synthetic.py", "tiny", "--llm", "judge"]):
        code, _, err = run_script(*command)
        assert code == 2
        assert "There are three ways to come by some" in err
        assert "generate_queries.py tiny" in err


def test_folds_are_about_equal():
    rng = random.Random(0)
    counts = [0] * 10
    for _ in range(5_000):
        counts[training.fold(str(rng.random()))] += 1
    assert all(400 < count < 600 for count in counts)
