"""Retrieval measures as trec_eval computes them, and paired tests between two systems."""

import re
from urllib.parse import quote

import numpy as np

from syntriever.data.dataset import Qrels

Run = dict[str, dict[str, float]]  # query id -> passage id -> score

Measures = dict[str, dict[str, float]]  # measure -> query id -> value

KS = (1, 3, 5, 10, 100)


def evaluate(qrels: Qrels, run: Run, ks: tuple[int, ...] = KS) -> Measures:
    """Values for nDCG@k (graded), MAP@k, Recall@k, P@k and MRR@k.

    Every judged query counts: one without results scores 0 (pytrec_eval alone would leave it out
    and inflate the mean). A grade below 0 counts as 0, as trec_eval has it.
    """
    import pytrec_eval

    cuts = ",".join(map(str, ks))
    names = {"nDCG": "ndcg_cut", "MAP": "map_cut", "Recall": "recall", "P": "P"}
    found = {query: run[query] for query in qrels if run.get(query)}
    graded = {query: {passage: max(grade, 0) for passage, grade in of_query.items()} for query, of_query in qrels.items()}
    wanted = {*(f"{name}.{cuts}" for name in names.values()), "recip_rank"}
    values = pytrec_eval.RelevanceEvaluator(graded, wanted).evaluate(found) if found else {}
    measures = {
        f"{label}@{k}": {query: values.get(query, {}).get(f"{name}_{k}", 0.0) for query in qrels}
        for label, name in names.items()
        for k in ks
    }
    # trec_eval's has no cut-off: it is 1 / rank of the first relevant passage, and counts where that rank is at most k.
    first = {query: values.get(query, {}).get("recip_rank", 0.0) for query in qrels}
    return measures | {f"MRR@{k}": {query: rr if rr > 1 / (k + 0.5) else 0.0 for query, rr in first.items()} for k in ks}


def trec_id(text: str) -> str:
    """An id as a TREC file can hold it: white space and % percent-encoded; `urllib.parse.unquote` gives it back."""
    return re.sub(r"[\s\0%]", lambda found: quote(found[0]), text)


def mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values())))


def paired_test(ours: dict[str, float], theirs: dict[str, float], rounds: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Mean difference ours - theirs over the same queries, its 95% bootstrap interval, and the
    two-sided p-value of a paired randomisation test (random signs)."""
    difference = np.array([ours[query] - theirs[query] for query in theirs])
    rng = np.random.default_rng(seed)
    observed, n = difference.mean(), len(difference)
    extreme, means = 0, np.empty(rounds)
    for start in range(0, rounds, 500):  # in blocks: memory stays small for any number of queries
        signs = rng.choice((-1.0, 1.0), size=(min(500, rounds - start), n))
        extreme += int((np.abs((signs * difference).mean(1)) >= abs(observed) - 1e-12).sum())
        means[start : start + 500] = difference[rng.integers(0, n, size=signs.shape)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(observed), "low": float(low), "high": float(high), "p": (extreme + 1) / (rounds + 1)}
