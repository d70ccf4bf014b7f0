"""LoRA: what is trained, averaged, resumed and saved. The loop's own tests run with adapters, too (test_training.py)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from syntriever.encode import models
from syntriever.encode.encoder import Encoder
from syntriever.train import checkpoint, lora

TEXTS = ["a set", "Return a sorted list of the items of an iterable.", "open a file " * 9]


def load(folder):
    return models.load(models.resolve(str(folder), "tiny"), "cpu")


def adapted(folder, seed=1):
    """The encoder with adapters of rank 4 that are as after training, and what merges them."""
    model = load(folder)
    adapters = lora.add(model, 4, seed)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, adapters


def vectors(model):
    return Encoder(model)(TEXTS, "document")


def saved(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_colbert"])
def test_adapters_change_nothing_at_first_and_the_encoder_is_frozen(request, name):
    model = load(request.getfixturevalue(name))
    before = vectors(model)
    lora.add(model, 4, 1)
    for made, expected in zip(vectors(model), before, strict=True):
        np.testing.assert_array_equal(made, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert trained == checkpoint.trained(model).keys()
    layers = [name for name, module in model[0].named_modules() if type(module) is torch.nn.Linear and "lora" not in name]
    assert len(trained) == 2 * len(layers) == 2 * 13  # six of each of the two layers, and the pooler


def test_merged_equals_unmerged_and_is_a_plain_checkpoint(tiny_encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    model, adapters = adapted(tiny_encoder)
    before, start = vectors(model), load(tiny_encoder)
    assert np.abs(before - vectors(start)).max() > 0.01
    adapters.merge_and_unload()
    np.testing.assert_allclose(vectors(model), before, atol=1e-5)
    for one, folder in ((model, tmp_path / "merged"), (start, tmp_path / "start")):
        models.save(one, folder, "")
    assert saved(tmp_path / "merged").keys() == saved(tmp_path / "start").keys()
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {path.name for path in (tmp_path / "start").iterdir()}
    made = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(TEXTS, prompt_name="document")
    np.testing.assert_allclose(made, before, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny_encoder", "tiny_colbert"])
def test_the_command_saves_both_merged_and_as_an_adapter(request, home, run_script, name):
    """The encoder before training with the adapter gives the vectors of the folder: nothing else was trained."""
    from peft import PeftModel

    base = request.getfixturevalue(name)
    options = ["--loss", "cluster", "--epochs", "2", "--batch-size", "6", "--max-length", "32", "--device", "cpu"]
    code, out, err = run_script("train_stage1.py", base, "tiny", "--lora", "4", "--save-adapter", *options)
    assert code == 0, err
    assert "--lora 4 trains 3,840 weights of adapters beside" in out
    output = home / "output" / f"{base.name}-sft-tiny"
    assert json.loads((output / "run.json").read_text())["options"]["lr"] == 2e-4
    assert not [path for path in models.resolve(f"{base.name}-sft", "tiny").weights if "adapter" in str(path)]
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    expected, model = vectors(load(output)), load(base)
    before = vectors(model)
    PeftModel.from_pretrained(model[0].auto_model, str(output / "adapter"))
    for made, merged, untrained in zip(vectors(model), expected, before, strict=True):
        np.testing.assert_allclose(made, merged, atol=1e-6)
        assert np.abs(made - untrained).max() > 1e-4


def test_options_that_do_not_go_together_are_refused(home, run_script):
    for script in ("train_stage1.py", "train_stage2.py"):
        code, out, err = run_script(script, "minilm", "tiny", "--save-adapter")
        assert (code, "--save-adapter saves what --lora RANK trains: add --lora" in err) == (2, True), err
        code, out, err = run_script(script, "minilm", "tiny", "--lora", "0")
        assert (code, "--lora must be positive, not 0" in err) == (2, True), err
