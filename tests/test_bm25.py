"""BM25 in the languages of the world."""

import json
import re

import pytest
from conftest import write_jsonl

from syntriever.encode import bm25


def words(text):
    return re.findall(bm25.WORD, bm25.segmented(text).lower())


# Two neighbouring characters are a word, as by Lucene's CJKAnalyzer; Latin words and numbers stay words.
SEGMENTED = {
    "使用Python 3.11语言": ["使用", "python", "11", "语言"],
    "東京タワーは333メートルです。": ["東京", "京タ", "タワ", "ワー", "ーは", "333", "メー", "ート", "トル", "ルで", "です"],
    "ﾄｳｷｮｳ ｶﾞﾗｽ ＰＹＴＨＯＮ": ["トウ", "ウキ", "キョ", "ョウ", "ガラ", "ラス", "python"],
    "กรุงเทพ ABC": ["กรุ", "รุง", "งเ", "เท", "ทพ", "abc"],
    "ພາສາລາວ": ["ພາ", "າສ", "ສາ", "າລ", "ລາ", "າວ"],
    "ភាសាខ្មែរ": ["ភាសា", "សាខ្", "ខ្មែ", "មែរ"],
    "မြန်မာ": ["မြန်", "န်မာ"],
    "서울의 인구": ["서울", "울의", "인구"],
    "猫 と 犬": ["猫", "と", "犬"],
    "हिन्दी भाषा": ["हिन्दी", "भाषा"],  # vowel signs are no letters to Python
    "தமிழ் மொழி": ["தமிழ்", "மொழி"],
    "cafe\u0301 naïve b": ["café", "naïve"],
    "An English text, with 2 numbers: 10.": re.findall(r"\b\w\w+\b", "an english text, with 2 numbers: 10."),
}


@pytest.mark.parametrize("text", SEGMENTED)
def test_words_of_any_script(text):
    assert words(text) == SEGMENTED[text]


LANGUAGES = {
    "chinese": ("english", ["北京是中国的首都", "上海是中国最大的城市", "长城很长"], "中国的首都是哪里？", 0),
    "japanese": (
        "none",
        ["富士山は日本で一番高い山です", "琵琶湖は日本で一番大きい湖です", "ﾄｳｷｮｳﾀﾜｰは東京にある"],
        "トウキョウタワーはどこ？",
        2,
    ),
    "thai": ("none", ["กรุงเทพเป็นเมืองหลวงของไทย", "เชียงใหม่อยู่ทางเหนือ", "ภูเก็ตเป็นเกาะ"], "เมืองหลวงของไทย", 0),
    "korean": ("none", ["서울은 한국의 수도이다", "부산은 항구 도시이다", "제주는 섬이다"], "수도는 어디", 0),
    "german": ("german", ["Die Häuser der Stadt", "Ein Auto fährt", "Der Baum"], "Haus", 0),
    "finnish": ("finnish", ["Talossa on lämmintä", "Auto ajaa", "Puu kasvaa"], "talo", 0),
    "russian": ("russian", ["Книги лежат на столе", "Машина едет", "Дерево растёт"], "книга", 0),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_baseline_finds_passages_in_any_language(tmp_path, monkeypatch, run_script, name):
    monkeypatch.setenv("SYNTRIEVER_HOME", str(tmp_path))
    language, passages, query, gold = LANGUAGES[name]
    folder = tmp_path / "datasets" / "other"
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{n}", "title": "", "text": text} for n, text in enumerate(passages)])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q", "text": query}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\tp{gold}\t1\n")
    code, out, err = run_script("evaluate.py", "bm25", "other", "--ks", "1", "--language", language)
    assert code == 0, err
    result = json.loads((tmp_path / "results" / "bm25_other_test.json").read_text())
    assert result["measures"]["nDCG@1"] == 1
    assert language in result["checkpoint"]


def test_a_baseline_that_finds_nothing_says_so(home, run_script):
    queries = home / "datasets" / "tiny" / "queries.jsonl"
    rows = [json.loads(line) for line in queries.read_text().splitlines()]
    write_jsonl(queries, [row | {"text": "zzzz"} for row in rows])
    code, out, err = run_script("evaluate.py", "bm25", "tiny", "--ks", "1")
    assert code == 0, err
    assert "12 of 12 queries have no result by bm25" in out


def test_an_unknown_language_is_refused_with_the_list(home, run_script):
    for language in ("klingon", "chinese", "porter"):
        code, _, err = run_script("evaluate.py", "bm25", "tiny", "--language", language)
        assert code == 2
        assert "none, arabic" in err
        assert "turkish" in err


def test_stop_words_and_stems_go_by_language():
    class Corpus:
        def __init__(self, *texts):
            self.texts = lambda: iter(texts)
            self.id = str

    def found(query, passage, language):
        ((_, hits),) = bm25.run(Corpus(passage, "something else entirely"), {"q": query}, 1, language)
        return bool(hits)

    assert found("houses", "a house", "english")
    assert not found("houses", "a house", "none")
    assert not found("the", "the house", "english")
    assert found("the", "the house", "none")
    assert found("the", "the house", "german")
    assert not found("der", "der Hund", "german")
    assert found("der", "der Hund", "english")
