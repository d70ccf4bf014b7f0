"""What a run asks for and uses, step by step: an estimate before, the total after, and hard limits."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syntriever.errors import BadInput, Failed
from syntriever.llm.ledger import Ledger, Request
from syntriever.llm.replies import Reply
from syntriever.run import terminal

PRICES = Path(__file__).parents[1] / "prices.json"


@dataclass(frozen=True)
class Price:
    """USD per token, and the date it was noted."""

    prompt: float
    completion: float
    date: str

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        return self.prompt * prompt_tokens + self.completion * completion_tokens


def price_of(model: str, batch: bool = False) -> Price | None:
    """Price of a model by `prices.json`, which users edit; None where it is not listed."""
    try:
        listed = json.loads(PRICES.read_text("utf-8"))
        if model not in listed["models"]:
            return None
        factor = (listed["batch_factor"] if batch else 1.0) / 1e6
        prompt, completion = listed["models"][model]
        return Price(prompt * factor, completion * factor, listed["date"])
    except (ValueError, KeyError, TypeError) as error:
        message = f'{PRICES}: expected {{"date", "batch_factor", "models": {{name: [prompt, completion]}}}} ({error!r})'
        raise BadInput(message) from None


class LimitReached(Failed):
    """`--max-requests` or `--max-cost`."""


class Meter:
    """Requests and tokens per step, and the limits on their sum.

    `--max-cost` is a budget for all runs together: what the ledger holds counts as `spent`. A request
    is admitted only if the budget holds even when it and all in flight use every token they may:
    no tokenizer makes more tokens of a prompt than it has bytes.
    """

    def __init__(
        self,
        price: Price | None = None,
        max_requests: int | None = None,
        max_cost: float | None = None,
        spent: tuple[int, int] = (0, 0),
    ) -> None:
        self.price, self._max_requests, self._max_cost = price, max_requests, max_cost
        self.steps: dict[str, dict[str, int]] = {}
        self._asked = self._in_flight = 0
        self._cost = self._reserved = 0.0
        self._before = price.of(*spent) if price else 0.0
        self._settled = asyncio.Event()

    async def admit(self, request: Request) -> float:
        """Wait until the request fits the limits; USD reserved for it. Raises `LimitReached`."""
        worst = self.price.of(len(request.prompt.encode()) + 20, request.max_tokens) if self.price else 0.0
        while self._max_cost is not None and self._before + self._cost + self._reserved + worst > self._max_cost:
            if self._before + self._cost + worst > self._max_cost or not self._in_flight:
                spent = f"{self._before + self._cost:.4f} USD spent so far, the next request may cost {worst:.4f}"
                raise LimitReached(f"stopped at --max-cost {self._max_cost:g} ({spent}); run again with a higher one to go on")
            self._settled.clear()
            await self._settled.wait()
        if self._max_requests is not None and self._asked >= self._max_requests:
            raise LimitReached(f"stopped at --max-requests {self._max_requests}; run again with a higher one to go on")
        self._asked += 1
        self._in_flight += 1
        self._reserved += worst
        return worst

    def settle(self, reserved: float) -> None:
        """Give back what was reserved for a request that was answered (0 for one that will be later)."""
        self._in_flight -= 1
        self._reserved -= reserved
        self._settled.set()

    def add(self, step: str, reply: Reply) -> None:
        """Count a reply that was paid for."""
        used = self.steps.setdefault(step, {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})
        used["requests"] += 1
        used["prompt_tokens"] += reply.prompt_tokens
        used["completion_tokens"] += reply.completion_tokens
        if self.price:
            self._cost += self.price.of(reply.prompt_tokens, reply.completion_tokens)

    def results(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"usage": self.steps} | ({"cost_usd": round(self._cost, 6), "prices_of": self.price.date} if self.price else {})

    def table(self) -> str:
        lines = [f"       {'step':<10}{'requests':>10}{'prompt tokens':>16}{'completion tokens':>20}{'USD':>10}"]
        steps = sorted(self.steps.items())
        if len(steps) > 1:
            steps.append(("total", {name: sum(used[name] for used in self.steps.values()) for name in steps[0][1]}))
        for step, used in steps:
            usd = f"{self.price.of(used['prompt_tokens'], used['completion_tokens']):.4f}" if self.price else "?"
            tokens = f"{used['prompt_tokens']:>16,}{used['completion_tokens']:>20,}"
            lines.append(f"       {step:<10}{used['requests']:>10,}{tokens}{usd:>10}")
        return "\n".join(lines)


class Imagined:
    """Stands in for a teacher to learn what a run would ask: measures each prompt, answers with filler
    of the length that replies have had so far, or else may have at most."""

    live, concurrency = False, 1

    def __init__(self, model: str, ledger: Ledger, price: Price | None) -> None:
        self.model, self.meter, self.guessed = model, Meter(price), False
        self._ledger, self.spent = ledger, ledger.used(model)
        self._count, self.tokenizer = token_counter(model)

    async def answer(self, request: Request) -> Reply:
        usual = self._ledger.usual_completion(self.model, request.step)
        self.guessed |= usual is None
        tokens = round(request.max_tokens if usual is None else usual)
        text = request.choices[0] if request.choices else " ".join(["word"] * tokens)
        # Filler is not in the grammar of a reply, but is not to be asked for once more either.
        reply = Reply(text, "imagined" if request.usable else "", "", self._count(request.prompt), tokens)
        self.meter.add(request.step, reply)
        return reply

    async def close(self) -> None:
        pass


def token_counter(model: str) -> tuple[Callable[[str], int], str]:
    """(function that counts tokens, name of the tokenizer it uses): the model's own where it is at
    hand, else four bytes a token."""
    try:
        import tiktoken

        encoding = tiktoken.encoding_for_model(model)
        return lambda text: len(encoding.encode(text, disallowed_special=())), f"tiktoken {encoding.name}"
    except (KeyError, OSError, ValueError):  # not a model of OpenAI; or its vocabulary cannot be had, or is another file
        pass
    if "/" in model:
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
            return lambda text: len(tokenizer(text)["input_ids"]), f"the tokenizer of {model}"
        except (OSError, ValueError, ImportError):
            pass
    return lambda text: len(text.encode()) // 4 + 1, "four bytes a token: the model's tokenizer is not at hand"


def say_estimate(imagined: Imagined, sampled: int, total: int, max_cost: float | None) -> None:
    """Print what `total` rows take at most, from the `sampled` ones that the teacher imagined."""
    if not imagined.meter.steps:
        terminal.say(f"estimate for {total:,} rows, from {sampled} of them: nothing to ask, the ledger has every reply")
        return
    meter = Meter(imagined.meter.price)
    for step, used in imagined.meter.steps.items():
        meter.steps[step] = {name: round(number * total / sampled) for name, number in used.items()}
    price = f"prices of {meter.price.date}" if meter.price else "no price is listed in syntriever/prices.json"
    bound = "replies as long as allowed" if imagined.guessed else "replies as long as those in the ledger"
    terminal.say(f"estimate for {total:,} rows, from {sampled} of them; {bound}; {imagined.tokenizer}; {price}")
    terminal.say(meter.table())
    tokens = [imagined.spent, *((used["prompt_tokens"], used["completion_tokens"]) for used in meter.steps.values())]
    if meter.price and max_cost is not None and sum(meter.price.of(*used) for used in tokens) > max_cost:
        terminal.say(f"note:  this may go beyond --max-cost {max_cost:g}; the run stops there and can be continued")
