"""From texts to vectors: batches under a token budget, on the backend that suits the machine."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from syntriever.encode import models, onnx_graph
from syntriever.errors import BadInput, Failed
from syntriever.run import terminal

CPU_TOKENS, GPU_TOKENS = 1_024, 32_768  # padded tokens of one forward pass: they fill the device, and little is padded
WORTH_AN_EXPORT = 1_000  # passages from which onnx saves more seconds than its export takes


class Encoder:
    """Unit vectors of texts by `model` on `backend`, with at most `batch_tokens` padded tokens a
    forward pass (None: what suits the device). On a GPU torch computes in bfloat16.

    When a forward pass runs out of memory it is done again in halves, and so are those after it.
    """

    def __init__(self, model: Any, backend: str = "torch", batch_tokens: int | None = None) -> None:
        import torch

        self.model, self.late, self.backend = model, models.is_late(model), backend
        self.dim = int(model.get_embedding_dimension())
        cuda = model.device.type == "cuda"
        self.budget = batch_tokens or (GPU_TOKENS if cuda else CPU_TOKENS)
        self.workers = 1
        self._bf16 = cuda and not self.late and torch.cuda.is_bf16_supported(including_emulation=False)
        self._forward: Callable[[dict[str, Any]], np.ndarray] = self._torch
        model.eval()
        if backend == "compile":
            encoder = model[0].auto_model
            encoder.forward = torch.compile(encoder.forward, dynamic=True)
        elif backend.startswith("onnx"):
            self._export(quantize=backend == "onnx-int8")

    def _export(self, quantize: bool) -> None:
        """Let onnxruntime do the forward passes; `BadInput` where that cannot be."""
        import torch

        if self.model.device.type != "cpu":
            raise BadInput(f"--backend {self.backend} runs on the CPU: add --device cpu")
        self._forward = onnx_graph.session(self.model, quantize)
        # One thread for each forward pass: on a CPU two passes side by side beat one in two threads.
        self.workers = torch.get_num_threads()

    def expect(self, passages: int) -> None:
        """Choose what `auto` stands for, now that the work is known: onnx on a CPU where the encoder survives
        the export and there is enough to encode to pay for it, else torch. Never a failure."""
        if self.backend != "auto" or self.late or self.model.device.type != "cpu" or self._forward != self._torch:
            return
        why = f"fewer than {WORTH_AN_EXPORT:,} passages"
        if passages >= WORTH_AN_EXPORT:
            try:
                self._export(quantize=False)
                why = ""
            except BadInput as error:
                why = str(error).removeprefix("--backend onnx: ")
        name = f"torch ({why})" if why else "onnx, whose vectors are those of torch to seven digits"
        terminal.say(f"note:  --backend auto: {name}")

    def settings(self) -> dict[str, Any]:
        """What decides an embedding of a passage. That `auto` may encode with onnx does not: it is told apart from
        torch by the seventh digit."""
        return {
            "model": fingerprint(self.model),
            "prefix": self.model.prompts["document"] or "",
            "max_length": self.model[0].document_length or self.model.max_seq_length,
            "dim": self.dim,
            "backend": self.backend.replace("auto", "torch") + (" bfloat16" if self._bf16 else ""),
        }

    def __call__(self, texts: Sequence[str], kind: str, ids: list[list[int]] | None = None) -> Any:
        """(len(texts), D) float32 unit vectors, or a list of (tokens, D) arrays by a late-interaction
        encoder. `kind` is "query" or "document" and picks the prefix; `ids` is `tokenize` of the texts."""
        if self.late:
            return self._late(texts, kind)
        ids = ids or self.tokenize(texts, kind)
        made = np.empty((len(ids), self.dim), np.float32)

        def run(batch: np.ndarray) -> None:
            for part in self._within_budget(batch, ids):
                self._run(part, ids, made)

        # The longest first, so that what is too much for the memory shows at once.
        order = np.argsort([-len(tokens) for tokens in ids], kind="stable")
        batches = list(self._within_budget(order, ids))
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(run, batches) if self.workers > 1 else map(run, batches))
        return made

    def tokenize(self, texts: Sequence[str], kind: str) -> list[list[int]]:
        """Token ids, prefix included; nothing for a late-interaction encoder, which does more than that."""
        return [] if self.late else models.tokenize(self.model, [(kind, text) for text in texts])

    def _within_budget(self, order: np.ndarray, ids: list[list[int]]) -> Iterator[np.ndarray]:
        """Cut text numbers, longest text first, into batches."""
        start = 0
        while start < len(order):
            size = max(1, self.budget // max(1, len(ids[order[start]])))
            yield order[start : start + size]
            start += size

    def _run(self, batch: np.ndarray, ids: list[list[int]], made: np.ndarray) -> None:
        longest = len(ids[batch[0]])
        try:
            made[batch] = self._forward(models.pad(self.model, [("", "")] * len(batch), [ids[text] for text in batch]))
            return
        except Exception as error:
            self._lower_budget(error, len(batch), longest)
        # Here the error and the tensors that it held are gone.
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        for part in self._within_budget(batch, ids):
            self._run(part, ids, made)

    def _lower_budget(self, error: Exception, texts: int, longest: int) -> None:
        """Halve a batch that was too much for the memory; another error is raised again."""
        if not _out_of_memory(error):
            raise error
        if texts == 1:
            raise Failed(f"out of memory for a single text of {longest} tokens; lower --max-length") from error
        smaller = texts // 2 * longest
        if smaller < self.budget:
            self.budget = smaller
            terminal.say(f"note:  out of memory; going on with --batch-tokens {smaller}")

    def _torch(self, tokens: dict[str, Any]) -> np.ndarray:
        import torch

        device = self.model.device
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
            vectors = models.forward(self.model, {name: value.to(device) for name, value in tokens.items()}, "")
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy() if self._bf16 else vectors.cpu().numpy()

    def _late(self, texts: Sequence[str], kind: str) -> list[np.ndarray]:
        longest = models.longest(self.model, kind)
        options = {"convert_to_numpy": True, "show_progress_bar": False, "normalize_embeddings": True}
        while True:
            size = max(1, self.budget // longest)
            try:
                made = self.model.encode(
                    list(texts), prompt=self.model.prompts[kind] or None, task=kind, batch_size=size, **options
                )
                return [np.asarray(vectors, np.float32) for vectors in made]
            except Exception as error:
                self._lower_budget(error, size, longest)


def _out_of_memory(error: Exception) -> bool:
    """Of a GPU, of the CPU's allocator in torch, or of onnxruntime."""
    return isinstance(error, MemoryError) or any(
        sign in str(error) for sign in ("out of memory", "allocate memory", "ALLOC_FAILED")
    )


def fingerprint(model: Any) -> str:
    """Hash of what a checkpoint says about an embedding: weights, modules, configuration, tokenizer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = model[0].auto_model.config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    tokenizer = model.tokenizer
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # those change by use
    settings = [[[type(m).__name__, m.get_config_dict()] for m in model], config, rules]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()
