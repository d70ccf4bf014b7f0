"""What an error of a server means, in whatever shape it comes: for the run, for one request, or for this moment only."""

import html
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from syntriever.llm.replies import line

# About one text: these rows fail, and the run goes on. `bad_request` is any other refusal, after which it may go on, too.
OF_A_TEXT = ("content_filter", "context_length")
OF_A_REQUEST = (*OF_A_TEXT, "bad_request")

# How refusals are told, from codes and words in lower case.
_MONEY = re.compile(
    r"insufficient[ _](?:\w+[ _])?(?:quota|balance|funds?|credits?)|exceeded_current_quota|payment[ _](?:is )?required|arrear|"
    r"(?:balance|credits?|funds)\b[^.]{0,40}\b(?:insufficient|too low|not enough|exhausted|depleted|negative|used up|ran out)|"
    r"(?:not enough|no|out of|low|used all|add|purchase|buy)\s+(?:\w+\s+){0,2}(?:credits?|funds|balance)\b|"
    r"billing[ _](?:hard[ _])?(?:limit|not[ _]active)|billing\b[^.]{0,30}(?:not active|inactive|disabled|overdue)|"
    r"account is not active|(?:spend|spending|credit)[ _](?:limit|cap)\b[^.]{0,30}(?:reached|exceeded|hit)|top[- ]?up|recharge|"
    r"budget has been exceeded|exceeded your current quota(?![\s\S]*(?:retry|again))|余额|欠费"
)
_CONTENT = re.compile(
    r"content[ _-]?(?:filter|policy|moderation|management|safety|exists[ _]risk)|moderation|\bflagged\b|invalid_prompt|"
    r"responsible ?ai|safety (?:system|filter|polic|reason)|(?:data|content)[ _]inspection|prohibited[ _]content|"
    r"inappropriate|harmful|\bunsafe\b|"
    r"(?:prompt|input|content|message|request)\b[^.]{0,40}\b(?:was|been|is|were) blocked|"
    r"violat\w+[^.]{0,40}(?:polic|guideline)|敏感|安全"
)
_FORBIDDEN_TEXT = re.compile(
    r"\b(?:prompt|content|input|topic)s?\b[^.]{0,60}\b(?:not (?:permit|allow)|reject|disallow|prohibit|denied)"
)
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|maximum context|too many (?:input )?tokens|reduce the length|string_above_max_length|"
    r"(?:prompt|input|request|messages?|text|sequence)\b[^.]{0,40}\b(?:too long|too large|exceeds?|longer than)|"
    r"\btokens?\b[^.]{0,40}exceed|`inputs` (?:tokens|must have)"
)
_CLOSED = re.compile(
    r"(?:account|organi[sz]ation|user)[ _][^.]{0,40}(?:deactivated|suspended|disabled|blocked|banned|closed|terminated|"
    r"overdue|restricted|good standing)"
)
_NO_RIGHT = re.compile(
    r"key|token|credential|permi|authenti|authori|access|region|countr|territor|location|subscri|scope|role|organi|project|"
    r"tier|plan|licen[sc]e|gated|verif|not allowed"
)
# Status of an error that comes without one, from its codes or else its words.
_STATUS = (
    (429, r"rate.?limit|too.?many.?req|resource.?exhausted|throttl"),
    (401, r"invalid.?api.?key|incorrect.?api.?key|api.?key.?invalid|authentication|unauthorized|unauthenticated|login fail"),
    (403, r"permission|forbidden|moderation"),
    (404, r"not.?found|unexpected endpoint|does not exist"),
    (503, r"overload|unavailable|server.?error|internal|time.?out|upstream|provider"),
    (400, r"invalid|bad.?request|unsupported|not.?supported|context.?length|content.?filter"),
)
# The settings that a request can do without, or under another name, and how servers speak of them.
_SETTINGS = {
    "response_format": r"response_?format|json.?(?:schema|object|mode)|schema|structured|grammar|guided",
    "logprobs": r"log_?probs?|log.probabilit",
    "temperature": r"temperature",
    "max_tokens": r"max_tokens\b",
    "max_completion_tokens": r"max_completion_tokens\b",
}
LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_OF_ITS_SIZE = (
    r"too (?:large|small|big|high|low)|exceed|at (?:most|least)|greater|less|between|maximum|minimum|positive|range|>|<"
)


@dataclass(frozen=True)
class Refusal:
    """`reason` goes into the row that fails, `words` are the server's own, in one line and without a key."""

    reason: str
    words: str = ""
    param: str = ""  # of the request, that the server names apart from its words

    def setting(self, body: dict[str, Any], without: frozenset[str] = frozenset()) -> str | None:
        """The setting of `body` that is refused and can be done without, if others were refused before.
        `temperature 0` is that of verdicts alone."""
        for name, spoken_of in _SETTINGS.items() if self.reason == "bad_request" else ():
            if name not in body or not re.search(spoken_of, self.param or self.words, re.I):
                continue
            if name not in LIMITS:
                return name if body[name] else f"{name} 0"
            # The name may be refused, and the other be right; or the number is, and then neither is.
            if LIMITS[name] not in without and (LIMITS[name] in self.words or not re.search(_OF_ITS_SIZE, self.words, re.I)):
                return name
        return None


def read(status: int, problem: Any, keys: Iterable[str] = ()) -> Refusal:
    """What the body of an error means, parsed or as text. Without a status (0) its codes and words tell it."""
    message, codes = _message(problem), " ".join(_fields(problem, ("code", "type", "status", "reason")))
    words, param = spoken(message, keys), " ".join(_fields(problem, ("param",)))
    said = f"{codes} {message[:1000]}".lower()
    if not status:
        numbers = [int(number) for number in re.findall(r"\b[45]\d\d\b", codes)]
        told = (number for text in (codes, message) for number, name in _STATUS if re.search(name, text, re.I))
        status = next(iter(numbers), 0) or next(told, 0)
    return Refusal(_reason(status, said), words, param)


def _reason(status: int, said: str) -> str:
    if status == 402 or (status < 500 and _MONEY.search(said)):
        return "no_credit"
    if status == 429:
        return "rate_limited"
    if status in (0, 408, 409, 425) or (status >= 500 and status != 501):
        return f"http_{status}" if status else "bad_body"
    if status == 413 or _TOO_LONG.search(said):
        return "context_length"
    if status not in (401, 404) and (_CONTENT.search(said) or (status == 403 and _FORBIDDEN_TEXT.search(said))):
        return "content_filter"
    if _CLOSED.search(said):
        return "no_credit"
    if status == 401 or (status == 403 and _NO_RIGHT.search(said)):
        return "no_access"
    return {404: "not_found", 405: "not_found", 410: "not_found", 407: "proxy"}.get(status, "bad_request")


def inside(completion: Any, keys: Iterable[str] = ()) -> Refusal | None:
    """The error that a reply of status 200 holds in place of a text; None where it holds none."""
    completion = completion[0] if isinstance(completion, list) and completion else completion
    if not isinstance(completion, dict):
        return None
    choices = completion.get("choices")
    problem = choices[0].get("error") if choices and isinstance(choices, list) and isinstance(choices[0], dict) else None
    if not choices and _message(completion):
        problem = completion
    return read(0, problem, keys) if problem else None


def _message(problem: Any) -> str:
    """The words of an error: OpenAI's, FastAPI's, Google's list, a page of HTML, plain text."""
    if isinstance(problem, str):
        if re.search(r"<(?:!doctype|html|head|body|title|h1)\b", problem[:1000], re.I):
            titled = re.search(r"<(title|h1)[^>]*>(.*?)</\1>", problem, re.S | re.I)
            bare = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", problem[:20_000], flags=re.S | re.I)
            return html.unescape(" ".join((titled[2] if titled and titled[2].strip() else bare).split()))
        return problem
    if isinstance(problem, list):
        return "; ".join(filter(None, map(_message, problem[:3])))
    if not isinstance(problem, dict):
        return ""
    fields = {str(name).lower(): value for name, value in problem.items()}
    names = "error message msg detail errors error_description error_message error_msg status_msg base_resp title reason".split()  # noqa: SIM905
    message = next(filter(None, (_message(fields.get(name)) for name in names)), "")
    if isinstance(fields.get("loc"), list):
        message = f"{'.'.join(map(str, fields['loc']))}: {message}"
    raw = fields["metadata"].get("raw") if isinstance(fields.get("metadata"), dict) else ""  # OpenRouter: the provider's own
    return f"{message}: {_message(raw)}" if raw else message


def _fields(problem: Any, names: tuple[str, ...], depth: int = 4) -> Iterator[str]:
    """The values of these names in an error and in what is nested in it."""
    if isinstance(problem, list):
        for item in problem[:3]:
            yield from _fields(item, names, depth - 1)
    elif isinstance(problem, dict) and depth:
        for name, value in problem.items():
            if name in names and isinstance(value, str | int):
                yield str(value)
            elif isinstance(value, dict | list):
                yield from _fields(value, names, depth - 1)


def body_of(response: Any) -> Any:
    """Body of a response: parsed where it is JSON, else as text."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return response.text


# A server may show a key, whole or in part; so may a proxy, a library, or a person who typed it into the wrong place.
_SECRET = re.compile(
    r"\b(?:bearer|basic)\s+(?!token|auth)\S+|\b(?:sk|pk|rk|gsk|xai|ghp|nvapi|hf)[-_][\w*.-]{4,}|\bAIza[\w-]+|"
    r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|(?<=://)[^/@\s]+(?=@)|"
    r"(?<=key)[\w ]{0,10}[\"']?[:=]\s*[\"']?(?=\S*[\d*])[\w*./+=-]{6,}",
    re.I | re.ASCII,
)
_TOKEN = re.compile(r"[\w+/=.*-]{16,}", re.ASCII)


def spoken(message: str, keys: Iterable[str] = ()) -> str:
    """First line of a message, 300 characters, with everything struck out that looks like a key or shares eight
    characters with one of `keys`."""
    text = line(message[:5000], 2000)
    for key in filter(None, keys):
        parts = {key[n : n + 8].lower() for n in range(max(1, len(key) - 7))}
        text = re.sub(r"\S+", lambda word, parts=parts: "***" if any(p in word[0].lower() for p in parts) else word[0], text)  # type: ignore[misc]
    return _TOKEN.sub(lambda token: "***" if _random(token[0]) else token[0], _SECRET.sub("***", text))[:300]


def _random(token: str) -> bool:
    """Whether a part of a token is as no name of a model is: 16 letters and digits, mixed."""
    return any(len(p) >= 16 and re.search(r"\d", p) and re.search(r"[a-z]", p, re.I) for p in re.split(r"[-_./+=*]", token))
