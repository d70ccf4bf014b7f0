"""What a reply is worth: a chat completion as text, without the model's thoughts, and why it is not usable if it is not."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from syntriever.llm.verdicts import parse_verdict


@dataclass(frozen=True)
class Reply:
    """What came back. `reason` is empty for a usable reply and else names why it is not; `message` says it in words.

    Without a `finish_reason` no reply arrived at all: it is not kept, and may be asked for again.
    """

    text: str = ""
    reason: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1
    message: str = ""
    thoughts: bool = False  # some were cut from the text
    log_odds: float | None = None  # of yes against no as the first word, where it was asked for and the server says

    def failure(self) -> dict[str, Any]:
        """What the row of a failure says of it."""
        return {"reason": self.reason, "attempts": self.attempts, "message": self.message}


# How servers say that a reply came to its end (OpenAI, Anthropic, Cohere, TGI, LM Studio, ...), and that it was cut off.
_COMPLETE = re.compile(
    r"stop(ped|_(sequence|token|str(ing)?))?|stopstringfound|eos(_token(_id)?|found)?|end(_turn|_?of_?(turn|text|sequence))?|"
    r"complete[d]?|finish(ed)?|done"
)
_CUT_OFF = re.compile(r"length|max.*token|tokens?_limit|^limit$|context_?window")
# Reasons of ours, each with a meaning of its own to a stage: a server's word must not pass for one.
_OURS = {"", "_", "written", "pending", "not_recorded", "tie", "disagreement", "unparsable", "empty", "only_thoughts"}
# Reasons that are read off the text: judged anew when a reply comes from a ledger.
_OF_TEXT = ("", "length", "empty", "unparsable", "only_thoughts")

_NAMES = r"(?:think(?:ing)?|thoughts?|thought_process|reasoning|reflection|analysis|scratchpad|inner_?(?:monologue|thoughts?))"
# Begin and end of a thought: <think>, </seed:think>, <|begin_of_thought|>, <|END_THINKING|>, [THINK], the channels of gpt-oss.
_THOUGHT = re.compile(
    rf"<\|? ?(?P<close>/?) ?(?:\w{{1,20}}:)?(?P<mark>begin_of_|end_of_|start_|end_)?{_NAMES}(?:\s[^<>/]{{0,80}})?\|?>"
    r"|(?<!\w)\[think\]|\[(?P<square>/)think\]|◁(?P<angle>/?)think▷|<\|channel>thought|(?P<closed><channel\|>)"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?P<channel>\w+)[^<]{0,80}(?:<\|constrain\|>\w+)?<\|message\|>",
    re.I,
)
# What models wrap an answer into, once they have thought, and tokens of an end that a server has let through.
_WRAPPED = re.compile(
    r"<(\|?)(?:begin_of_|start_)?(answer|final_answer|output|response|solution|verdict)\1>(.*?)(?:</\2>)?", re.S | re.I
)
_END_TOKEN = re.compile(r"(?:</s>|<\|\w{1,30}\|>|<end_of_turn>|<eos>)\Z", re.I)


def without_thoughts(text: str) -> tuple[str, bool]:
    """`text` without what the model thought before or between, and whether there was any. An opening mark without
    its end begins a thought that was cut off; before an end without opening mark all is thought."""
    text, start, inside, found = text.strip(), 0, False, False
    parts: list[str] = []
    if re.match("analysis", text) and "assistantfinal" in text:  # channels whose marks the server has dropped
        text, found = text.rpartition("assistantfinal")[2], True
    for mark in _THOUGHT.finditer(text):
        of = mark.groupdict()
        ends = (of["channel"] or "").lower() == "final" or (of["mark"] or "").lower().startswith("end")
        if ends or of["close"] or of["square"] or of["angle"] or of["closed"]:
            parts = parts if inside else []
            start, inside = mark.end(), False
        elif not inside:
            parts.append(text[start : mark.start()])
            inside = True
        found = True
    text = "".join([*parts, "" if inside else text[start:]]).strip()
    for _ in range(3):
        text = _END_TOKEN.sub("", text).rstrip()
    wrapped = _WRAPPED.fullmatch(text)
    return wrapped[3].strip() if wrapped else text, found


def ended(word: str) -> str:
    """`stop` where a finish reason says that the reply came to its end, `length` where it was cut off; any other word
    as it is, fit for a file."""
    plain = re.sub(r"[^a-z]+", "_", word.lower()).strip("_")
    plain = re.sub(r"^(?:finish_?reason|stop_?reason|reason)_", "", plain)
    if not word or _COMPLETE.fullmatch(plain):
        return "stop"
    own = re.sub(r"[^\w.-]+", "_", word, flags=re.ASCII)[:40]
    return "length" if _CUT_OFF.search(plain) else f"finish_{own}" if own in _OURS else own


def judged(reply: Reply, choices: tuple[str, ...] = (), usable: Callable[[str], object] | None = None) -> Reply:
    """`reply` by the one rule for all teachers, live, in batches and from ledgers: its thoughts cut, and the reason why
    it is no passage or, with `choices`, no verdict, or not `usable`. A judge that talks until it is cut off is
    unparsable, too."""
    if reply.reason not in _OF_TEXT:
        return reply
    text, cut = without_thoughts(reply.text)
    thoughts, finish, reason, message = reply.thoughts or cut, ended(reply.finish_reason), "", ""
    if finish not in ("stop", "length"):
        reason, message = finish, f"the server ended the reply with {finish}"
    elif not text:
        reason = finish if finish == "length" else "only_thoughts" if thoughts else "empty"
        message = (line(reply.text) or reply.message) if thoughts else ""
    elif choices and not parse_verdict(text, choices, finish == "length"):
        reason, message = "unparsable", line(text)
    elif not choices and finish == "length":
        reason = finish
    elif usable and not usable(text):
        reason, message = "unparsable", line(text)
    if reason == "length":
        option = "--verdict-max-tokens" if choices else "--max-tokens"
        message = f"cut off at the token limit, which counts thoughts, too; a higher {option} asks again"
    finish = "length" if finish == "length" else reply.finish_reason
    return replace(reply, text=text, reason=reason, finish_reason=finish, message=message, thoughts=thoughts)


def line(text: str, most: int = 300) -> str:
    """The first line of a text that says anything, cut at `most` characters, without control characters."""
    printable = ("".join(c if c.isprintable() else " " for c in row).split() for row in text.splitlines())
    return " ".join(next(filter(None, printable), []))[:most]


def read(completion: Any, prompt: str) -> Reply:
    """Reply of a chat completion, not yet judged; `ValueError` where the JSON is none. Without usage, tokens are estimated."""
    try:
        choice = completion["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason") or "stop"
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        parts = [part if isinstance(part, dict) else {"text": part} for part in parts]
        text = "".join(_text(part) for part in parts).encode("utf-8", "replace").decode()  # half a surrogate pair
        hidden = any(message.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details", "thinking"))
        hidden |= any(re.search("think|reason", str(part.get("type"))) for part in parts)
        refusal = message.get("refusal") or next((part["refusal"] for part in parts if part.get("refusal")), "")
        usage = completion.get("usage")
        usage = usage or {"prompt_tokens": len(prompt.encode()) // 4, "completion_tokens": len(text.encode()) // 4}
        asked, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError("not a chat completion") from error
    finish = str(finish.get("type") if isinstance(finish, dict) else finish)
    text, reason = text.strip(), "refusal" if refusal else ""
    odds = log_odds(choice.get("logprobs"))
    return Reply(text, reason, finish, asked, written, message=line(str(refusal)), thoughts=hidden and not text, log_odds=odds)


def log_odds(logprobs: Any) -> float | None:
    """Log-odds of yes against no as the first word of the answer, thoughts left out, from the top log-probabilities of an
    OpenAI-compatible server. Spellings of a word are added up; a word that is not listed counts as the least likely that is.
    None where neither is listed, or nothing is."""
    try:
        places = [(str(place["token"]), place.get("top_logprobs") or ()) for place in logprobs["content"]]
        text = "".join(token for token, _ in places)
        answer = without_thoughts(text)[0]
        first = re.search(r"\w", answer)
        left = text.rindex(answer) + first.start() if first else len(text)
        for token, top in places:
            left -= len(token)
            if left < 0:
                listed = [(re.sub(r"\W+", "", str(each["token"])).lower(), math.exp(min(0.0, each["logprob"]))) for each in top]
                yes, no = (math.fsum(p for word, p in listed if word == said) for said in ("yes", "no"))
                least = max(min((p for _, p in listed), default=0.0), 1e-12)
                return math.log((yes or least) / (no or least)) if yes or no else None
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # none, or of another shape
    return None


def _text(part: dict[str, Any]) -> str:
    """Text of one part of a message's content; none of a thought or a picture."""
    text = part.get("text") if part.get("type", "text") in ("text", "output_text") else ""
    return "" + ((text.get("value") if isinstance(text, dict) else text) or "")
