"""BM25, the baseline that needs no encoder."""

from collections.abc import Iterable

from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits


def run(corpus: Corpus, queries: dict[str, str], k: int) -> Iterable[tuple[str, Hits]]:
    """Top `k` of Lucene's BM25 (k1 0.9, b 0.4 as in Anserini and BEIR), English stop words, stemmed."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    tokenizer = {"stopwords": "en", "stemmer": stemmer, "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index(bm25s.tokenize(list(corpus.texts()), **tokenizer), show_progress=True)
    positions, scores = index.retrieve(bm25s.tokenize(list(queries.values()), **tokenizer), k=k, show_progress=True)
    for query, row, row_scores in zip(queries, positions, scores, strict=True):
        yield query, [(corpus.id(int(p)), float(s)) for p, s in zip(row, row_scores, strict=True) if s > 0]
