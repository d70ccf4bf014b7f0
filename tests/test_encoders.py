"""Encoders as people have them: precision, prefixes, lengths and padding of many architectures; what is refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FAST, library, write_jsonl
from safetensors.torch import load_file, save_file

from syntriever.encode import models, prefixes, shards
from syntriever.encode.encoder import Encoder, fingerprint
from syntriever.errors import BadInput
from syntriever.train import checkpoint, lora

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DECODER = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, **SMALL}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
# Relative positions as in Microsoft's checkpoints, whose vocabulary of positions is no limit.
DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}

# name: (class of the model, its settings, tokens of the longest text; None: any number)
ARCHITECTURES = {
    "bert": ("BertModel", {"max_position_embeddings": 64, **SMALL}, 64),
    "roberta": ("RobertaModel", {"max_position_embeddings": 66, **SMALL}, 64),
    "xlm-roberta": ("XLMRobertaModel", {"max_position_embeddings": 66, **SMALL}, 64),
    "mpnet": ("MPNetModel", {"max_position_embeddings": 66, **SMALL}, 64),
    "bart": ("BartModel", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}, 64),
    "deberta": ("DebertaV2Model", {"max_position_embeddings": 64, **SMALL, **DEBERTA}, None),
    "t5": ("T5EncoderModel", T5, None),
    "mt5": ("MT5EncoderModel", T5, None),
    "modernbert": ("ModernBertModel", {"max_position_embeddings": 64, **SMALL}, 64),
    "gpt2": ("GPT2Model", {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}, 64),
    "qwen3": ("Qwen3ForCausalLM", DECODER, 64),
    "llama": ("LlamaModel", DECODER, 64),
    "gemma3": ("Gemma3TextModel", {"use_bidirectional_attention": True, "sliding_window": 8, **DECODER}, 64),
}
DECODERS = ("gpt2", "qwen3", "llama")  # their tokenizers have no padding token


def tokenizer_of(texts, name):
    """Byte-level BPE as in RoBERTa and GPT-2, trained on the texts; without a limit of length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(named.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if name in DECODERS:
        named = {"eos_token": "</s>", **({"padding_side": "left"} if name == "qwen3" else {})}
    else:
        ends = [("<s>", 0), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory, docstrings):
    """folder_of("roberta"): a tiny random model of that architecture as a plain transformers checkpoint."""
    import transformers

    root, made = tmp_path_factory.mktemp("architectures"), {}

    def build(name):
        if name not in made:
            tokenizer = tokenizer_of((text for pair in docstrings for text in pair), name)
            model_class, settings, _ = ARCHITECTURES[name]
            kind = getattr(transformers, model_class)
            torch.manual_seed(0)
            ends = {"pad_token_id": None if name in DECODERS else 1, "bos_token_id": 0, "eos_token_id": 2}
            model = kind(kind.config_class(vocab_size=len(tokenizer), **settings, **ends))
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
            made[name] = root / name
        return made[name]

    return build


@pytest.fixture
def copy(tmp_path):
    """copy(folder, name): a copy that a test may change."""
    return lambda folder, name: shutil.copytree(folder, tmp_path / "models" / name)


def load(folder, *length, **given):
    return models.load(models.resolve(str(folder), "tiny", **given), "cpu", *length)


def setting(folder, file, **changes):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


@pytest.fixture
def own_preferences(home, docstrings):
    path = home / "own.jsonl"
    ids = [i for i, _, _ in docstrings[:36]]
    write_jsonl(path, [{"query_id": f"q-{i}", "preferred_id": i, "rejected_id": ids[n - 1]} for n, i in enumerate(ids)])
    return path


# --- precision


def in_half(folder, dtype):
    """Store the weights in half precision, and say so as transformers does."""
    for path in folder.rglob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    setting(folder, "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


def with_dense(folder, dtype):
    """A sentence-transformers checkpoint in float32 with a Dense layer in half precision."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(str(folder), device="cpu")
    model.append(Dense(32, 16))
    shutil.rmtree(folder)
    model.save_pretrained(str(folder), create_model_card=False)
    (dense,) = folder.glob("2_Dense/model.safetensors")
    save_file({name: value.to(dtype) for name, value in load_file(dense).items()}, dense)
    setting(folder, "sentence_bert_config.json", model_kwargs={"torch_dtype": str(dtype).removeprefix("torch.")})
    setting(folder, "config.json", dtype="bfloat16")  # and the file holds float32
    return folder


def of(folder):
    return {
        f"{path.parent.name} {name}": value for path in folder.rglob("*.safetensors") for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("stage", ["train_stage1.py", "train_stage2.py"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "dense", "colbert"])
def test_any_checkpoint_is_trained_in_float32(home, own_preferences, run_script, tiny_encoder, tiny_colbert, copy, stage, kind):
    """In bfloat16 a step of 2e-5 moves no weight above 0.005; in float16 AdamW's second moment is 0."""
    folder = copy(tiny_colbert if kind == "colbert" else tiny_encoder, "mine")
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    folder = with_dense(folder, dtype) if kind == "dense" else in_half(folder, dtype)
    extra = ["--loss", "infonce"] if stage == "train_stage1.py" else ["--preferences", own_preferences]
    options = ["--epochs", "1", "--batch-size", "6", "--lr", "2e-5", "--max-length", "32", "--device", "cpu"]
    code, _, err = run_script(stage, folder, "tiny", *extra, *options)
    assert code == 0, err
    output = home / "output" / ("mine-sft-tiny" if stage == "train_stage1.py" else "mine-final-tiny")
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    saved, model = of(output), load(output)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in saved.values())
    before = dict(load(folder).named_parameters())
    files = {name.partition(" ")[2]: value.float() for name, value in of(folder).items()}
    for name in ("encoder.layer.0.output.dense.weight", "linear.weight"):  # as exact as the file, whatever the config says
        found = [value for key, value in before.items() if key.endswith(name)]
        assert all(torch.equal(value, files.get(name, files.get(f"bert.{name}"))) for value in found)
    moved = {name: float((before[name] != value).float().mean()) for name, value in model.named_parameters()}
    assert {name: share for name, share in moved.items() if "layer.0" in name and "weight" in name and share < 0.8} == {}


def test_a_cpu_encodes_in_float32(tiny_encoder, copy, docstrings):
    folder = in_half(copy(tiny_encoder, "e5-small-half"), torch.float16)
    wide = copy(folder, "e5-small-wide")
    for path in wide.rglob("*.safetensors"):
        save_file({name: value.float() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    setting(wide, "config.json", dtype="float32")
    texts = [passage for _, _, passage in docstrings]
    made, expected = (Encoder(load(one))(texts, "document") for one in (folder, wide))
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, expected)


# --- prefixes

SAVED = {
    "nomic": ({"search_query": "sq: ", "search_document": "sd: ", "classification": "c: "}, None, ("sq: ", "sd: ")),
    "mxbai": ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
    "stella": ({"s2p_query": "s2p: ", "s2s_query": "s2s: "}, None, ("s2p: ", "")),
    "mteb": ({"Retrieval-query": "rq: ", "Retrieval-passage": "rp: "}, None, ("rq: ", "rp: ")),
    "gemma": ({"Retrieval-query": "rq: ", "Retrieval-document": "rd: ", "STS": "s: "}, None, ("rq: ", "rd: ")),
    "embeddinggemma": ({"STS": "s: ", "query": "rq: ", "Retrieval-query": "x", "document": "rd: "}, None, ("rq: ", "rd: ")),
    "jina": ({"retrieval.query": "rq: ", "retrieval.passage": "rp: "}, None, ("rq: ", "rp: ")),
    "corpus": ({"query": "q: ", "corpus": "c: "}, None, ("q: ", "c: ")),
    "saved again": ({"query": "", "document": "", "search_query": "sq: ", "search_document": "sd: "}, None, ("sq: ", "sd: ")),
    "linq": ({"web_search_query": "wq: ", "sts_query": "s: "}, None, ("wq: ", "")),
    "default": ({"instruction": "i: "}, "instruction", ("i: ", "i: ")),
    "default of one side": ({"query": "q: "}, "query", ("q: ", "")),
    "default of the other": ({"search_query": "q: ", "text": "t: "}, "text", ("q: ", "t: ")),
    "unknown": ({"asking": "a: ", "told": "t: "}, None, ("", "")),
    "none": ({}, None, ("", "")),
}


@pytest.mark.parametrize("name", SAVED)
def test_prompts_of_a_checkpoint_are_its_prefixes(tiny_encoder, copy, name, capsys):
    prompts, default, expected = SAVED[name]
    folder = copy(tiny_encoder, "mine")
    setting(folder, "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    write_jsonl(folder / "modules.json", [])
    load(copy(tiny_encoder, "plain")).save_pretrained(str(folder))
    setting(folder, "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    model = load(folder)
    assert (model.prompts["query"], model.prompts["document"]) == expected
    said = capsys.readouterr().out
    unused = {"stella": "s2s_query", "linq": "sts_query", "unknown": "asking, told"}.get(name)
    assert ("--query-prefix and --passage-prefix set" in said) == bool(unused)
    assert not unused or f"its prompts {unused} are not used" in said


def test_prefixes_go_through_all_stages_with_the_checkpoint(home, tiny_encoder, own_preferences, run_script, copy):
    folder = copy(tiny_encoder, "mine")
    own = ["--query-prefix", "ask: ", "--passage-prefix", "tell: "]
    code, out, err = run_script("train_stage1.py", folder, "tiny", "--loss", "infonce", "--epochs", "1", *FAST, *own)
    assert code == 0, err
    said = json.loads((home / "output" / "mine-sft-tiny" / "config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "ask: ", "document": "tell: "}
    retrieve = ["retrieval.py", "mine-sft", "tiny", "--top-k", "5", "--device", "cpu"]
    code, out, err = run_script(*retrieve)
    assert code == 0, err
    assert "prefix" not in out  # the checkpoint's own: nothing to say
    sidecars = home.glob("output/mine-sft-tiny/embeddings/tiny/*/embeddings.json")
    assert [json.loads(path.read_text())["prefix"] for path in sidecars] == ["tell: "]
    code, out, err = run_script(*retrieve, "--passage-prefix", "other: ", "--query-prefix", "ask: ")
    assert code == 0, err
    assert "--passage-prefix 'other: ' for mine-sft instead of 'tell: '" in out
    assert "--query-prefix" not in out
    sidecars = list(home.glob("output/mine-sft-tiny/embeddings/tiny/*/embeddings.json"))
    assert {json.loads(path.read_text())["prefix"] for path in sidecars} == {"tell: ", "other: "}
    code, out, err = run_script("train_stage2.py", "mine-sft", "tiny", "--preferences", own_preferences, *FAST, "--epochs", "1")
    assert code == 0, err
    said = json.loads((home / "output" / "mine-final-tiny" / "config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "ask: ", "document": "tell: "}
    code, out, err = run_script(
        "evaluate.py", "mine-sft", "mine-final", "tiny", "--ks", "5", "--query-prefix", "x", "--device", "cpu"
    )
    assert code == 0, err
    assert "--query-prefix 'x' for mine-final instead of 'ask: '" in out


def test_prefixes_that_are_known_by_name_stay(tiny_encoder, stage1):
    assert load(tiny_encoder).prompts == {"query": "query: ", "document": "passage: "}
    assert load(tiny_encoder, query_prefix="").prompts == {"query": "", "document": "passage: "}
    setting(stage1, "config_sentence_transformers.json", prompts={"query": "", "document": ""})
    assert load(stage1).prompts == {"query": "", "document": ""}  # of this project: it says that there are none
    assert prefixes.of_name("multilingual-e5-large") == prefixes.E5


def test_the_prefix_changes_the_vectors_and_the_default_of_a_checkpoint_can_be_saved(tiny_encoder, copy, tmp_path, home):
    from syntriever.data.corpus import Corpus

    folder = copy(tiny_encoder, "mine")
    load(copy(tiny_encoder, "plain")).save_pretrained(str(folder))
    setting(folder, "config_sentence_transformers.json", prompts={"search_query": "sq: "}, default_prompt_name="search_query")
    model = load(folder)
    np.testing.assert_array_equal(
        Encoder(model)(["a set"], "query"), Encoder(load(folder, query_prefix=""))(["sq: a set"], "query")
    )
    models.save(model, tmp_path / "saved", "")
    assert load(tmp_path / "saved").prompts == {"query": "sq: ", "document": ""}
    corpus, base = Corpus("tiny"), tmp_path / "embeddings"
    folders = {shards.embed(Encoder(load(folder, passage_prefix=p)), corpus, base).folder for p in (None, "p: ", "q: ", "")}
    assert len(folders) == 3


# --- lengths and padding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_reads_what_it_can(folder_of, name, docstrings):
    limit = ARCHITECTURES[name][2]
    model = load(folder_of(name))
    assert model.max_seq_length == (limit or {"deberta": 64}.get(name, 512))
    texts = ["", "one", *(passage for _, _, passage in docstrings[:5]), "a long text of many words " * 100]
    for kind in ("query", "document"):
        made = Encoder(model)(texts, kind)
        assert np.isfinite(made).all()
        np.testing.assert_allclose(made[1:], library(model, texts[1:], kind), atol=1e-5)
        np.testing.assert_allclose(np.concatenate([Encoder(model)([text], kind) for text in texts]), made, atol=1e-5)
    if limit is None:
        assert np.isfinite(Encoder(load(folder_of(name), 700))(texts, "document")).all()
        return
    assert load(folder_of(name), limit).max_seq_length == limit
    for above in (limit + 1, limit + 2):
        with pytest.raises(BadInput, match=f"--max-length {above}: this encoder reads at most {limit} tokens"):
            load(folder_of(name), above)


@pytest.mark.parametrize(("name", "more"), [*((n, []) for n in ("roberta", "t5", "gpt2", "qwen3")), ("qwen3", ["--lora", "4"])])
def test_every_architecture_goes_through_the_stages(home, folder_of, own_preferences, run_script, name, more):
    """At its own length, with passages longer than that."""
    common = ["--batch-size", "12", "--device", "cpu", "--epochs", "1", *more]
    corpus = home / "datasets" / "tiny" / "corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    write_jsonl(corpus, [row | {"text": row["text"] + " word" * (600 if row is rows[0] else 0)} for row in rows])
    code, _, err = run_script("train_stage1.py", folder_of(name), "tiny", "--candidates", "8", *common)
    assert code == 0, err
    code, _, err = run_script("retrieval.py", f"{name}-sft", "tiny", "--top-k", "5", "--device", "cpu", "--backend", "torch")
    assert code == 0, err
    code, _, err = run_script("train_stage2.py", f"{name}-sft", "tiny", "--preferences", own_preferences, *common)
    assert code == 0, err


@pytest.mark.parametrize("stage", ["train_stage1.py", "retrieval.py", "evaluate.py"])
def test_a_length_of_the_config_that_is_two_too_long_is_refused(home, folder_of, run_script, stage):
    options = {"evaluate.py": ["--ks", "5"], "train_stage1.py": ["--loss", "infonce"]}.get(stage, ["--top-k", "5"])
    code, _, err = run_script(stage, folder_of("roberta"), "tiny", "--max-length", "66", *options, "--device", "cpu")
    assert code == 2
    assert "at most 64 tokens" in err


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(folder_of, copy):
    folder = copy(folder_of("gpt2"), "bare")
    setting(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(BadInput, match="no padding token; name one as pad_token"):
        load(folder)


# --- the aliases of 2024 and 2025, as their checkpoints are built

RELEASED = {  # alias: (architecture, pooling, widths of the Dense layers after it)
    "qwen3": ("qwen3", "lasttoken", []),
    "gemma": ("gemma3", "mean", [32, 64, 32]),
    "bge-m3": ("xlm-roberta", "cls", []),
    "gte": ("modernbert", "cls", []),
    "arctic": ("bert", "cls", []),
}


@pytest.mark.parametrize("alias", RELEASED)
def test_an_alias_encodes_and_trains_as_documented(home, folder_of, run_script, monkeypatch, docstrings, tmp_path, alias):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    architecture, pooling, widths = RELEASED[alias]
    folder, prompts = tmp_path / "released", models.ALIASES[alias][1]
    made = SentenceTransformer(str(folder_of(architecture)), device="cpu")
    made[1].pooling_mode = pooling
    for width, next_width in itertools.pairwise(widths):
        made.append(Dense(width, next_width, bias=False, activation_function=None))
    made.append(Normalize())
    made.save_pretrained(str(folder), create_model_card=False)
    monkeypatch.setitem(models.ALIASES, alias, (str(folder), prompts))

    def find(name):
        return models.load(models.resolve(name, "tiny"), "cpu")

    model = find(alias)
    assert [model.prompts["query"], model.prompts["document"]] == [*prompts]
    assert (model.tokenizer.padding_side == "left") == (alias == "qwen3")
    texts = ["one", *(query for _, query, _ in docstrings[:6]), *(passage for _, _, passage in docstrings[:3])]
    before = {}
    for kind, prompt in zip(("query", "document"), prompts, strict=True):
        before[kind] = Encoder(model)(texts, kind)
        np.testing.assert_allclose(before[kind], model.encode([prompt + text for text in texts]), atol=1e-5)
        np.testing.assert_allclose(np.concatenate([Encoder(model)([text], kind) for text in texts]), before[kind], atol=1e-5)
    assert (np.abs(before["query"] - before["document"]).max() < 1e-6) == (prompts[0] == prompts[1])

    step = ["--loss", "infonce", "--epochs", "1", "--batch-size", "36", "--lr", "1e-3", "--device", "cpu"]
    code, _, err = run_script("train_stage1.py", alias, "tiny", *step)
    assert code == 0, err
    output = home / "output" / f"{alias}-sft-tiny"
    trained, again = find(f"{alias}-sft"), SentenceTransformer(str(output), device="cpu")
    moved = {name for name, value in trained.named_parameters() if not torch.equal(value, dict(model.named_parameters())[name])}
    assert {name for name, _ in model.named_parameters() if ".linear." in name} <= moved  # Dense layers, too
    assert len(moved) > 10
    for kind, encode in (("query", again.encode_query), ("document", again.encode_document)):
        made = Encoder(trained)(texts, kind)
        assert np.abs(made - before[kind]).max() > 1e-3
        np.testing.assert_allclose(made, encode(texts), atol=1e-5)  # its prompts and its modules are saved with it
    setting(folder, "config_sentence_transformers.json", prompts={"query": "own: ", "document": ""})
    assert find(alias).prompts == {"query": "own: ", "document": ""}  # the checkpoint's come first


# --- devices


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps:7", "CPU", "0"])
@pytest.mark.parametrize(
    "command", ["train_stage1.py minilm", "train_stage2.py minilm", "retrieval.py minilm", "evaluate.py bm25"]
)
def test_a_device_that_is_not_there_is_refused_before_the_data(home, run_script, device, command):
    code, out, err = run_script(*command.split(), "tiny", "--device", device)
    assert code == 2
    assert f"--device {device}: not one of those that torch finds on this machine: cpu" in err
    assert "read" not in out


# --- what is refused


def static(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    shutil.rmtree(folder)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu").save_pretrained(str(folder))


def model2vec(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    setting(folder, "config.json", model_type="model2vec", architectures=["StaticModel"])
    save_file({"embeddings": torch.zeros(3, 4)}, folder / "model.safetensors")


def adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    setting(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen3-Embedding-0.6B")


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def splade(folder):
    setting(folder, "config_sentence_transformers.json", model_type="SparseEncoder", prompts={})
    modules = ["sentence_transformers.models.Transformer", "sentence_transformers.sparse_encoder.models.SpladePooling"]
    (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": ""} for kind in modules]))


def cross(folder):
    setting(folder, "config.json", architectures=["BertForSequenceClassification"])


def reranker(folder):
    setting(folder, "config_sentence_transformers.json", model_type="CrossEncoder")


def tagger(folder):
    setting(folder, "config.json", architectures=["BertForTokenClassification"])


def bag(folder):
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.WordEmbeddings", "path": "0_WordEmbeddings"}]')


def numbered(folder):
    (folder / "modules.json").write_text("[0, [], null]")
    (folder / "config.json").unlink()


REFUSED = {
    numbered: r"is not a checkpoint: it needs config\.json",
    static: "begins with StaticEmbedding, which is no transformer",
    model2vec: "begins with StaticEmbedding, which is no transformer",
    bag: "begins with WordEmbeddings, which is no transformer",
    adapter: r"is a LoRA adapter: merge it into its base model first \(peft: merge_and_unload",
    pickled: r"pytorch_model\.bin is a pickle.*convert it to safetensors.*save_pretrained",
    splade: "is a sparse encoder.*Name a dense encoder",
    cross: "is a cross-encoder.*Name a dense encoder",
    reranker: "is a cross-encoder.*Name a dense encoder",
    tagger: "is a cross-encoder or another model with a classification head",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("stage", ["train_stage1.py", "retrieval.py"])
def test_what_is_no_encoder_is_refused_with_what_to_do(home, tiny_encoder, copy, run_script, monkeypatch, spoil, stage):
    import re

    folder = copy(tiny_encoder, "other")
    spoil(folder)
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("it was loaded"))
    code, out, err = run_script(stage, folder, "tiny")
    assert code == 2
    assert re.search(REFUSED[spoil], err)
    assert "read" not in out


def test_the_advice_for_a_pickle_works(tiny_encoder, copy, home):
    folder = copy(tiny_encoder, "e5-small-old")
    expected = Encoder(load(folder))(["a set"], "query")
    pickled(folder)
    with pytest.raises(BadInput) as caught:
        load(folder)
    program = str(caught.value).partition('python -c "')[2].rstrip('"')
    exec(program, {})
    np.testing.assert_array_equal(Encoder(load(f"{folder}-safe"))(["a set"], "query"), expected)


def test_a_checkpoint_in_shards_is_one(tiny_encoder, copy, docstrings):
    folder = copy(tiny_encoder, "e5-small-shards")
    expected = Encoder(load(folder))(["a set"], "document")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({n: weights[n] for n in weights if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    ref = models.resolve(str(folder), "tiny")
    assert len(ref.weights) == 2
    np.testing.assert_array_equal(Encoder(models.load(ref, "cpu"))(["a set"], "document"), expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00002"):
        load(folder)


def test_what_a_checkpoint_lacks_is_the_same_each_time(tiny_encoder, copy):
    """A pooler that nothing uses is made up; embeddings and adapters know the encoder by all its weights."""
    folder = copy(tiny_encoder, "e5-small-poolerless")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    found = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.add(fingerprint(load(folder)))
    assert len(found) == 1


def test_a_checkpoint_has_the_adapters_alone_and_takes_nothing_else(folder_of):
    """Also where a weight has two names, as the word embeddings of T5."""
    model = load(folder_of("t5"))
    lora.add(model, 4, 1)
    found = checkpoint.trained(model)
    assert found
    assert all(".lora_" in name for name in found)
    with pytest.raises(RuntimeError, match="other"):
        checkpoint.put(model, {"other": torch.zeros(1)})


def test_the_old_layout_of_sentence_transformers_is_read(tiny_encoder, copy, tmp_path):
    """The transformer in a folder of its own."""
    model = load(copy(tiny_encoder, "mine"))
    folder = tmp_path / "old"
    model.save_pretrained(str(folder))
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "0_Transformer").mkdir()
    for path in [*folder.glob("*.safetensors"), *folder.glob("*token*.json"), folder / "config.json", *folder.glob("sentence_*")]:
        path.rename(folder / "0_Transformer" / path.name)
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    ref = models.resolve(str(folder), "tiny")
    assert len(ref.weights) == 1
    np.testing.assert_array_equal(Encoder(models.load(ref, "cpu"))(["a set"], "query"), Encoder(model)(["a set"], "query"))


def pylate(folder):
    setting(folder, "config_sentence_transformers.json", model_type="ColBERT")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(splade, "splade-v3 is a sparse encoder"), (pylate, "hf download naver/splade-v3 --local-dir FOLDER, and name it")],
)
def test_an_encoder_of_the_hub_is_looked_at_before_its_weights(tiny_encoder, copy, monkeypatch, spoil, said):
    import sentence_transformers.util

    folder = copy(tiny_encoder, "other")
    spoil(folder)
    monkeypatch.setattr(sentence_transformers.util, "load_file_path", lambda where, file: str(folder / file))
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(BadInput, match=said):
        models.load(models.resolve("naver/splade-v3", "tiny"), "cpu")


def test_pooling_without_the_prompt_is_refused_with_what_to_do(tiny_encoder, copy, tmp_path):
    folder = tmp_path / "mine"
    models.save(load(copy(tiny_encoder, "plain")), folder, "")
    setting(folder, "1_Pooling/config.json", include_prompt=False)
    with pytest.raises(BadInput, match="set include_prompt to true in the config"):
        load(folder)
    setting(folder, "1_Pooling/config.json", include_prompt=True)
    load(folder)


def test_a_chat_template_is_no_part_of_an_encoder(folder_of, tmp_path, docstrings):
    """What is trained on plain texts must not be saved as an encoder of messages."""
    from sentence_transformers import SentenceTransformer

    chat = tmp_path / "chat"
    shutil.copytree(folder_of("qwen3"), chat)
    template = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    (chat / "chat_template.jinja").write_text(template)
    texts, plain = [query for _, query, _ in docstrings[:5]], load(folder_of("qwen3"))
    models.save(load(chat), tmp_path / "saved", "")
    made = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts)
    np.testing.assert_allclose(made, Encoder(plain)(texts, "query"), atol=1e-6)


def test_a_length_that_a_checkpoint_cuts_its_vectors_to_is_left_to_dim(tiny_encoder, copy, tmp_path):
    folder = tmp_path / "short"
    models.save(load(copy(tiny_encoder, "whole")), folder, "")
    expected = Encoder(load(folder))(["a set"], "query")
    setting(folder, "config_sentence_transformers.json", truncate_dim=8)
    np.testing.assert_array_equal(Encoder(load(folder))(["a set"], "query"), expected)


def test_a_bare_checkpoint_says_its_pooling(tiny_encoder, folder_of, copy, capsys):
    load(copy(tiny_encoder, "bare"))
    load(folder_of("qwen3"))
    said = capsys.readouterr().out
    assert "bare has no modules.json, which would name its pooling; it gets mean" in said
    assert "qwen3 has no modules.json, which would name its pooling; it gets lasttoken" in said


def test_broken_files_are_bad_input(tiny_encoder, copy):
    for number, (file, text) in enumerate([("tokenizer.json", "{}"), ("config.json", '{"model_type": "no-such"}')]):
        folder = copy(tiny_encoder, f"broken{number}")
        (folder / file).write_text(text)
        with pytest.raises(BadInput, match="cannot load broken"):
            load(folder)
