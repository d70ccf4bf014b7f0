"""Every loss against a plain double loop in float64, its gradients, and its limits."""

import itertools
import math

import pytest
import torch

import train_stage1
import train_stage2
from syntriever.encode import models

TAU = 0.05


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_batch(batch, dim=7):
    """query, passage, positive, cot, negative in float64, close enough that no softmax saturates."""
    base = torch.randn(dim, dtype=torch.float64)
    return [(base + 0.3 * torch.randn(batch, dim, dtype=torch.float64)).requires_grad_() for _ in range(5)]


def score(a, b):
    a, b = a.detach(), b.detach()
    return float(a @ b / (a.norm() * b.norm())) / TAU


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def masks(batch, case):
    generator = torch.Generator().manual_seed(5)
    verified = torch.rand(batch, generator=generator) > 0.4
    present = torch.rand(batch, 3, generator=generator) > 0.4
    return {
        "all": (torch.ones(batch, dtype=torch.bool), None),
        "rejected": (verified, None),
        "none verified": (torch.zeros(batch, dtype=torch.bool), None),
        "missing": (verified, present),
        "gold only": (verified, torch.zeros(batch, 3, dtype=torch.bool)),
    }[case]


def views(i, tensors, verified, present):
    """(kind, tensor) of the row's own positives besides gold: cot, and positive where verified."""
    there = [True] * 3 if present is None else present[i].tolist()
    own = []
    if there[1]:
        own.append((3, tensors[3][i]))
    if there[0] and bool(verified[i]):
        own.append((2, tensors[2][i]))
    return own


def all_of(kind, tensors, present):
    """Texts of one kind (1 gold, 2 positive, 3 cot, 4 negative) that are there."""
    column = {2: 0, 3: 1, 4: 2}.get(kind)
    return [t for j, t in enumerate(tensors[kind]) if column is None or present is None or bool(present[j, column])]


def loop_snn(tensors, verified, present):
    query = tensors[0]
    total = 0.0
    for i in range(len(query)):
        everything = [score(query[i], c) for kind in (1, 2, 3, 4) for c in all_of(kind, tensors, present)]
        own = [score(query[i], tensors[1][i])] + [score(query[i], v) for _, v in views(i, tensors, verified, present)]
        total += log_sum_exp(everything) - log_sum_exp(own)
    return total / len(query)


def loop_authors(tensors, verified, present):
    query = tensors[0]
    total = 0.0
    for i in range(len(query)):
        everything = [score(query[i], c) for kind in (1, 2, 3, 4) for c in all_of(kind, tensors, present)]
        total += log_sum_exp(everything) - score(query[i], tensors[1][i])
    return total / len(query)


def loop_cluster(tensors, verified, present, weight=0.3):
    query, gold = tensors[0], tensors[1]
    negatives = all_of(4, tensors, present)
    total = 0.0
    for i in range(len(query)):
        own = views(i, tensors, verified, present)
        to_gold = []
        for anchor in [query[i], *(v for _, v in own)]:
            candidates = [score(anchor, c) for c in [*gold, *negatives]]
            to_gold.append(log_sum_exp(candidates) - score(anchor, gold[i]))
        to_view = []
        for kind, view in own:
            candidates = [score(query[i], c) for c in [*all_of(kind, tensors, present), *negatives]]
            to_view.append(log_sum_exp(candidates) - score(query[i], view))
        total += sum(to_gold) / len(to_gold) + weight * (sum(to_view) / len(to_view) if to_view else 0.0)
    return total / len(query)


def of_scores(loss):
    return lambda *texts: loss(*train_stage1.score_candidates(*texts))


STAGE1 = {
    "snn": (train_stage1.soft_nearest_neighbor_loss, loop_snn),
    "authors": (of_scores(train_stage1.authors_of), loop_authors),
    "cluster": (train_stage1.cluster_loss, loop_cluster),
}


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("case", ["all", "rejected", "none verified", "missing", "gold only"])
@pytest.mark.parametrize("name", STAGE1)
def test_stage1_losses_equal_the_loops(name, case, batch):
    loss, loop = STAGE1[name]
    tensors = random_batch(batch)
    verified, present = masks(batch, case)
    value = loss(*tensors, verified, TAU, present)
    assert value.item() == pytest.approx(loop(tensors, verified, present), abs=1e-6)
    value.backward()
    assert all(torch.isfinite(t.grad).all() for t in tensors if t.grad is not None)


def test_without_synthetic_texts_snn_is_info_nce():
    tensors = random_batch(5)
    nothing = torch.zeros(5, 3, dtype=torch.bool)
    verified = torch.ones(5, dtype=torch.bool)
    snn = train_stage1.soft_nearest_neighbor_loss(*tensors, verified, TAU, nothing)
    info_nce = of_scores(train_stage1.info_nce_of)(*tensors, verified, TAU)
    loop = sum(log_sum_exp([score(q, p) for p in tensors[1]]) - score(q, tensors[1][i]) for i, q in enumerate(tensors[0])) / 5
    assert snn.item() == pytest.approx(loop, abs=1e-9)
    assert info_nce.item() == pytest.approx(loop, abs=1e-9)


def test_snn_golden_value_by_hand():
    """One row, tau 1: scores gold 1, positive 0, cot -1, negative 0; the positive is rejected."""
    query, passage = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    positive, cot, negative = torch.tensor([[0.0, 3.0]]), torch.tensor([[-1.0, 0.0]]), torch.tensor([[0.0, -1.0]])
    loss = train_stage1.soft_nearest_neighbor_loss(
        query, passage, positive, cot, negative, torch.tensor([False]), temperature=1.0
    )
    e = math.e
    assert loss.item() == pytest.approx(math.log((e + 1 + 1 / e + 1) / (e + 1 / e)), rel=1e-5)


@pytest.mark.parametrize("name", STAGE1)
def test_absent_texts_have_no_influence_and_no_gradient(name):
    loss = STAGE1[name][0]
    verified, present = masks(4, "missing")
    tensors = random_batch(4)
    loss(*tensors, verified, TAU, present).backward()
    for column, kind in enumerate((2, 3, 4)):
        assert not tensors[kind].grad[~present[:, column]].any()
    changed = [t.detach().clone() for t in tensors]
    for column, kind in enumerate((2, 3, 4)):
        changed[kind][~present[:, column]] = 1e3 * torch.randn(7, dtype=torch.float64)
    with torch.no_grad():
        before, after = (loss(*group, verified, TAU, present).item() for group in (tensors, changed))
    assert before == pytest.approx(after, abs=1e-12)


def test_snn_pulls_own_positives_and_pushes_the_rest():
    """Gradient by finite differences on each text in turn: own positives pulled, all others pushed."""
    tensors = [t.detach() for t in random_batch(3)]
    verified = torch.tensor([True, False, True])

    def loss_of_row_0(group):
        scores, own = train_stage1.score_candidates(*group, verified, TAU, None)
        return (scores.flatten(1).logsumexp(1) - own.logsumexp(1))[0].item()

    base = loss_of_row_0(tensors)
    for kind, row in itertools.product((1, 2, 3, 4), range(3)):
        nearer = [t.clone() for t in tensors]
        nearer[kind][row] += 1e-4 * tensors[0][0] / tensors[0][0].norm()  # a step towards query 0
        change = loss_of_row_0(nearer) - base
        is_own = row == 0 and kind in (1, 2, 3)
        assert (change < 0) == is_own, (kind, row, change)


@pytest.mark.parametrize("name", STAGE1)
def test_gradients_equal_finite_differences(name):
    verified, present = masks(3, "missing")
    tensors = random_batch(3, dim=4)

    def loss(*group):
        return STAGE1[name][0](*group, verified, TAU, present)

    assert torch.autograd.gradcheck(loss, tensors, eps=1e-6, atol=1e-5)


# --- stage 2


def loop_partial_plackett_luce(query, preferred, rejected):
    total = 0.0
    for i, q in enumerate(query):
        everything = [score(q, c) for c in [*preferred, *rejected]]
        without = everything[:i] + everything[i + 1 :]
        total += log_sum_exp(everything) - score(q, preferred[i]) + log_sum_exp(without) - score(q, rejected[i])
    return total / len(query)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_partial_plackett_luce_equals_the_loop(batch):
    query, preferred, rejected = random_batch(batch)[:3]
    loss = train_stage2.partial_plackett_luce_loss(query, preferred, rejected, TAU)
    assert loss.item() == pytest.approx(loop_partial_plackett_luce(query, preferred, rejected), abs=1e-6)
    assert torch.autograd.gradcheck(
        lambda *group: train_stage2.partial_plackett_luce_loss(*group, TAU), (query, preferred, rejected), atol=1e-5
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_partial_plackett_luce_sums_over_all_orders_of_the_rest(batch):
    """P(c+ first, c- second) equals the sum of Plackett-Luce probabilities of every full ranking of
    the 2B passages that starts with c+, c-."""
    query, preferred, rejected = (t.detach() for t in random_batch(batch)[:3])
    tau = 0.5  # soft enough that every permutation matters
    total = 0.0
    for i, q in enumerate(query):
        passages = [*preferred, *rejected]
        weights = [math.exp(float(torch.cosine_similarity(q, c, dim=0)) / tau) for c in passages]
        probability = 0.0
        others = [j for j in range(2 * batch) if j not in (i, batch + i)]
        for rest in itertools.permutations(others):
            order, factor = [i, batch + i, *rest], 1.0
            for position, j in enumerate(order):
                factor *= weights[j] / sum(weights[k] for k in order[position:])
            probability += factor
        total -= math.log(probability)
    loss = train_stage2.partial_plackett_luce_loss(query, preferred, rejected, tau)
    assert loss.item() == pytest.approx(total / batch, abs=1e-9)


def test_partial_plackett_luce_pulls_the_preferred_most_and_pushes_strangers():
    tensors = [t.detach() for t in random_batch(3)[:3]]
    gradients = []
    for row in range(3):
        for kind in (1, 2):
            leaf = [t.clone().requires_grad_() for t in tensors]
            candidates = torch.cat(leaf[1:])
            loss = train_stage2.plackett_luce_of(models.similarity(leaf[0], candidates) / TAU, torch.tensor([[0, 0, 3]]))
            gradient = torch.autograd.grad(loss, leaf[kind])[0][row]
            gradients.append((row, kind, float(gradient @ tensors[0][0])))
    towards = {(row, kind): value for row, kind, value in gradients}
    assert towards[0, 1] < 0  # the preferred passage is pulled
    assert all(value > 0 for (row, _), value in towards.items() if row)  # other rows' passages are pushed


def test_bradley_terry_equals_the_formula():
    query, preferred, rejected = random_batch(4)[:3]
    expected = sum(math.log1p(math.exp(score(q, rejected[i]) - score(q, preferred[i]))) for i, q in enumerate(query)) / 4
    pairs = torch.arange(4)[:, None] + torch.tensor([0, 0, 4])
    loss = train_stage2.bradley_terry_of(models.similarity(query, torch.cat([preferred, rejected])) / TAU, pairs)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_kl_equals_the_loop_and_is_zero_at_the_reference():
    query, candidates, _, _, _ = random_batch(4)
    ref_query, ref_candidates = (t.detach() for t in random_batch(4)[:2])
    expected = 0.0
    for i in range(4):
        ours = [score(query[i], c) for c in candidates]
        theirs = [score(ref_query[i], c) for c in ref_candidates]
        ours, theirs = [v - log_sum_exp(ours) for v in ours], [v - log_sum_exp(theirs) for v in theirs]
        expected += sum(math.exp(a) * (a - b) for a, b in zip(ours, theirs, strict=True)) / 4
    kl = train_stage2.kl_to_reference(query, candidates, ref_query, ref_candidates, TAU)
    assert kl.item() == pytest.approx(expected, abs=1e-6)
    assert kl.item() > 0
    same = train_stage2.kl_to_reference(query, candidates, query.detach(), candidates.detach(), TAU)
    assert same.item() == pytest.approx(0.0, abs=1e-12)


def test_kl_gives_the_reference_no_gradient():
    tensors = random_batch(3)[:4]
    train_stage2.kl_to_reference(*tensors, TAU).backward()
    assert tensors[0].grad.abs().sum() > 0
    assert tensors[2].grad is None
    assert tensors[3].grad is None


@pytest.mark.parametrize("loss", [loss for loss, _ in STAGE1.values()])
def test_float32_is_close_to_float64(loss):
    tensors = [t.detach() for t in random_batch(16, dim=64)]
    verified, present = masks(16, "missing")
    double = loss(*tensors, verified, TAU, present).item()
    single = loss(*(t.float() for t in tensors), verified, TAU, present).item()
    assert single == pytest.approx(double, rel=1e-5)


def test_share_of_gold_counts_each_text_once():
    gradient = torch.diag(torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]))
    # query 0; passages 1 and 4; texts 2, 3 and 1, which is a gold passage; -1 is absent
    places = torch.tensor([[0, 1, 2, 3, -1], [0, 4, 2, -1, 1]])
    assert float(train_stage1.share_of_gold(gradient, places)) == pytest.approx((1 + 4) / (1 + 4 + 2 + 3))
    assert float(train_stage1.share_of_gold(gradient, torch.tensor([[0, 1, -1, -1, -1]]))) == 1
    assert float(train_stage1.share_of_gold(gradient[:, None], places)) == pytest.approx(0.5)


def test_corpus_contrast_is_its_formula():
    query, candidates = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
    gold, relevant = [4, 0, 4], [{4}, {0, 2, 5}, {1, 4}]
    mask = torch.tensor([[column in some for column in range(6)] for some in relevant])

    def expected():
        total = 0.0
        for i in range(3):
            scores = [score(query[i], candidate) for candidate in candidates]
            total += log_sum_exp([s for j, s in enumerate(scores) if j == gold[i] or j not in relevant[i]]) - scores[gold[i]]
        return total / 3

    loss = train_stage1.corpus_contrast(query, candidates, torch.tensor(gold), mask, TAU)
    with torch.no_grad():
        assert float(loss) == pytest.approx(expected(), abs=1e-9)
    assert torch.autograd.gradcheck(lambda q: train_stage1.corpus_contrast(q, candidates, torch.tensor(gold), mask, TAU), query)


def test_view_distillation_is_its_formula():
    batch, passages = 4, 9
    query, candidates, views = (torch.randn(n, 5, dtype=torch.float64) for n in (batch, passages, batch))
    query.requires_grad_()
    told = torch.tensor([True, False, True, True])

    def expected():
        total = 0.0
        for i in range(batch):
            row, wanted = ([score(one[i], candidate) for candidate in candidates] for one in (query, views))
            for s, w in zip(row, wanted, strict=True):
                total += told[i].item() * math.exp(w - log_sum_exp(wanted)) * (log_sum_exp(row) - s)
        return total / batch

    loss = train_stage1.view_distillation(query, candidates, views, told, TAU)
    assert float(loss.detach()) == pytest.approx(expected(), abs=1e-9)
    loss.backward()
    for i, d in itertools.product(range(batch), range(5)):
        both = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                query[i, d] += step
            both.append(expected())
        with torch.no_grad():
            query[i, d] += 1e-5
        assert float(query.grad[i, d]) == pytest.approx((both[0] - both[1]) / 2e-5, abs=1e-5)
