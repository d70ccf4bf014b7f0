"""An encoder on onnxruntime, for CPUs: fused operators in float32, or 8-bit integers."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from syntriever.encode import models
from syntriever.errors import BadInput


def session(model: Any, quantize: bool) -> Callable[[dict[str, Any]], np.ndarray]:
    """Forward pass of `model`: what `models.pad` returns -> (texts, D) float32 unit vectors.

    With `quantize`, weights are 8-bit integers, one scale a channel, and activations are quantised as
    they come. The graph is made anew in each process (seconds): no file can go stale. Raises `BadInput`
    where the encoder does not survive the export.
    """
    import torch
    from torch import nn

    try:
        import onnxruntime
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers import optimizer
    except ImportError as error:
        raise BadInput(f"--backend onnx needs onnxruntime and onnx ({error}): pip install -r requirements.txt") from None

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]

    transformer = model[0].auto_model

    def tensors(*texts: str) -> dict[str, Any]:
        pairs = [("document", text) for text in texts]
        padded = models.pad(model, pairs, models.tokenize(model, pairs))
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    sample = tensors("What is dense retrieval?", "The search for passages whose vectors are near the query's.")
    others = tensors(
        "A word.", "A batch of another size, whose texts have other lengths. " * 20, ""
    )  # what the trace did not see
    axes = {0: "texts", 1: "tokens"}
    before = transformer.config._attn_implementation
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("root").setLevel(logging.ERROR)
            plain, fused, small = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "fused", "small"))
            transformer.set_attn_implementation("eager")  # the form that the optimizer knows and fuses
            torch.onnx.export(
                Graph().eval(),  # else the export puts the model back into training mode
                tuple(sample.values()),
                plain,
                input_names=list(sample),
                output_names=["vectors"],
                dynamic_axes=dict.fromkeys(sample, axes) | {"vectors": {0: "texts"}},
                opset_version=17,
                dynamo=False,
            )
            heads, width = transformer.config.num_attention_heads, transformer.config.hidden_size
            optimizer.optimize_model(plain, "bert", heads, width, opt_level=0).save_model_to_file(fused)
            if quantize:
                quantize_dynamic(
                    fused,
                    small,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    reduce_range=True,  # 7 bits: without VNNI instructions a sum of 8-bit products overflows
                    extra_options={"DefaultTensorType": TensorProto.FLOAT},
                )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1  # passes run side by side instead
            options.log_severity_level = 3
            made = onnxruntime.InferenceSession(small if quantize else fused, options, providers=["CPUExecutionProvider"])
            expected = model(dict(others))["sentence_embedding"].numpy()
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BadInput(f"--backend onnx: this encoder cannot be exported ({reason}); use --backend torch") from error
    finally:
        transformer.set_attn_implementation(before)

    def forward(tokens: dict[str, Any]) -> np.ndarray:
        vectors: np.ndarray = made.run(None, {name: tokens[name].numpy() for name in sample})[0]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    cosine = float((forward(others) * expected).sum(1).min())
    if not cosine > (0.9 if quantize else 0.99999):
        raise BadInput(f"--backend onnx: this encoder does not survive the export (cosine {cosine:.5f}); use --backend torch")
    return forward
