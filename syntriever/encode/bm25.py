"""BM25, the baseline that needs no encoder: words of any script, with the stop words and stems of a language."""

import argparse
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable

from syntriever.data.corpus import Corpus
from syntriever.data.dataset import Hits
from syntriever.errors import BadInput

# Accents and vowel signs: part of a word, but no letters to `\w`.
MARKS = "".join(mark for mark in map(chr, range(0x300, 0x1_0000)) if unicodedata.category(mark).startswith("M"))

# Scripts without blanks between words: Thai and Lao, Myanmar, Khmer, Tai, Balinese, Han, kana, Yi, Javanese; and
# Hangul, whose endings are glued to the words. As by Lucene's CJK analyser, two neighbouring characters are a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\ua4cf"
    "\ua960-\uaadf\uac00-\ud7ff\uf900-\ufaff\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
CHARACTER = re.compile(rf"(?=\w)[{UNSPACED}][{MARKS}]*")
RUN = re.compile(rf"(?:{CHARACTER.pattern})+")
WORD = rf"[\w{MARKS}]{{2,}}|(?=\w)[{UNSPACED}]"

HALF_WIDTH = re.compile("[\uff00-\uffef]+")  # and full-width Latin


def add_language(parser: argparse.ArgumentParser) -> None:
    """The option of the scripts that run BM25; `check_language` checks it."""
    what = "of the texts, for the stemmer and the stop words of bm25, or none (default: %(default)s)"
    parser.add_argument("--language", type=str.lower, default="english", help=what)


def check_language(language: str) -> None:
    import Stemmer

    known = ["none", *(name for name in Stemmer.algorithms() if "porter" not in name)]
    if language not in known:
        raise BadInput(f"--language {language}: not one of {', '.join(known)}. Without a stemmer, as for Chinese: none")


def segmented(text: str) -> str:
    """The text with each two neighbouring characters of `UNSPACED` scripts between blanks, as a word."""
    if text.isascii():
        return text
    text = HALF_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)

    def words(run: re.Match[str]) -> str:
        characters = CHARACTER.findall(run[0])
        return f" {' '.join(map(''.join, itertools.pairwise(characters))) or run[0]} "

    return RUN.sub(words, unicodedata.normalize("NFC", text))


def run(corpus: Corpus, queries: dict[str, str], k: int, language: str = "english") -> Iterable[tuple[str, Hits]]:
    """Top `k` of Lucene's BM25 (k1 0.9, b 0.4 as in Anserini and BEIR), without the stop words that bm25s has for
    the language, stemmed by Snowball."""
    import bm25s
    import Stemmer

    stop = getattr(bm25s.stopwords, "STOPWORDS_EN" if language == "english" else f"STOPWORDS_{language.upper()}", ())
    stemmer = None if language == "none" else Stemmer.Stemmer(language)
    tokenizer = {"stopwords": list(stop), "stemmer": stemmer, "token_pattern": WORD, "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    bar = sys.stderr.isatty()  # its own, which fills a log file
    index.index(bm25s.tokenize(list(map(segmented, corpus.texts())), **tokenizer), show_progress=bar)
    asked = bm25s.tokenize(list(map(segmented, queries.values())), **tokenizer)
    positions, scores = index.retrieve(asked, k=k, show_progress=bar)
    for query, row, row_scores in zip(queries, positions, scores, strict=True):
        yield query, [(corpus.id(int(p)), float(s)) for p, s in zip(row, row_scores, strict=True) if s > 0]
