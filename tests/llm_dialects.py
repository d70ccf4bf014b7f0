"""What servers say in place of a plain completion, and what becomes of it: one table for live synthesis, --batch and
comparison. `text` is what the model meant to say."""

from collections.abc import Callable
from typing import NamedTuple

from llm_server import Answer, failure, said


class Dialect(NamedTuple):
    sends: Callable[[str], Answer]
    reason: str = ""  # of the row; none: the row is good, and holds the text
    words: str = ""  # in the row's message
    verdict: str | None = None  # reason of a comparison, where it is another


def error(status, body):
    return lambda text: Answer(status, body)


def around(before, after="", **fields):
    return lambda text: said(f"{before}{text}{after}", **fields)


def parts(*others, kind="text"):
    return lambda text: said([*others, {"type": kind, "text": text}])


TEXT = "A passage about the topic."
CHANNELS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm: yes, no, 1, 2."}]}

# A text that is there, in some shape.
GOOD = {
    "Ollama, vLLM without a parser": around("<think>\nHm: yes, no, 1, 2.\n</think>\n\n"),
    "capitals": around("<THINK>Hm.</THINK>"),
    "thinking": around("<thinking>Hm.</thinking>\n"),
    "reasoning": around("<reasoning>Hm.</reasoning>"),
    "thought": around("<thought>Hm.</thought>"),
    "Seed": around("<seed:think>Hm.</seed:think>"),
    "an attribute": around('<think effort="low">Hm.</think>'),
    "Magistral": around("[THINK]Hm.[/THINK]"),
    "Kimi-VL": around("◁think▷Hm.◁/think▷"),
    "OpenThoughts": around("<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|>", "<|end_of_solution|>"),
    "Command": around("<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>", "<|END_RESPONSE|>"),
    "gpt-oss": around(CHANNELS, "<|return|>"),
    "gpt-oss, marks dropped": around("analysisWe see.assistantfinal"),
    "only the end of a thought": around("Hm: yes, no.\n</think>\n\n"),
    "a thought cut off behind it": around("", "\n<think>Hm."),
    "a thought in a thought": around("<think>Hm, <think>hm</think> hm.</think>"),
    "Hunyuan": around("<think>Hm.</think>\n<answer>", "</answer>"),
    "end token": around("<think></think>", "<|im_end|>"),
    "parts": parts(),
    "Mistral": parts(THINKING),
    "parts of reasoning": parts({"type": "reasoning", "text": "Hm."}, kind="output_text"),
    "parts as texts": lambda text: said([text]),
    "reasoning apart": lambda text: said(text, reasoning_content="Hm."),
    "error: null": lambda text: Answer(200, {**said(text).body, "error": None}),
    "Together": around("", finish="eos"),
    "TGI": around("", finish="eos_token"),
    "Anthropic": around("", finish="end_turn"),
    "Anthropic, stop sequence": around("", finish="stop_sequence"),
    "Cohere": around("", finish="COMPLETE"),
    "Google": around("", finish="STOP"),
    "Google, as an enum": around("", finish="FinishReason.STOP"),
    "no finish reason": around("", finish=None),
}

# What is about one request: its row fails, the run goes on.
ROW = {
    "only thoughts": Dialect(around("<think>", "</think>"), "only_thoughts", "think"),
    "thoughts without an end": Dialect(around("<think>Hm. "), "only_thoughts"),
    "the reasoning field alone": Dialect(lambda text: said(None, reasoning_content=text), "only_thoughts"),
    "a part of reasoning alone": Dialect(lambda text: said([THINKING]), "only_thoughts"),
    "reasoning until the limit": Dialect(
        lambda text: said(None, "length", reasoning_content=text), "length", "max-tokens asks again"
    ),
    "thoughts until the limit": Dialect(around("<think>", finish="length"), "length", "max-tokens asks again"),
    "MAX_TOKENS": Dialect(around("", finish="MAX_TOKENS"), "length", "--max-tokens", verdict=""),
    "model_length": Dialect(around("", finish="model_length"), "length", "--max-tokens", verdict=""),
    "error": Dialect(around("", finish="error"), "error"),
    "SAFETY": Dialect(around("", finish="SAFETY"), "SAFETY"),
    "DeepSeek": Dialect(around("", finish="insufficient_system_resource"), "insufficient_system_resource"),
    "vLLM, aborted": Dialect(around("", finish="abort"), "abort"),
    "tool_calls": Dialect(around("", finish="tool_calls"), "tool_calls"),
    "content_filter": Dialect(around("", finish="content_filter"), "content_filter"),
    "a word of ours": Dialect(around("", finish="tie"), "finish_tie"),
    "another word of ours": Dialect(around("", finish="written"), "finish_written"),
    "no word at all": Dialect(around("", finish="../a\n\x1b[31m"), ".._a_31m"),
    "a refusal": Dialect(lambda text: said(None, refusal="I cannot help."), "refusal", "I cannot help."),
    "a part of refusal": Dialect(lambda text: said([{"type": "refusal", "refusal": "I cannot."}]), "refusal", "I cannot."),
    "moderation": Dialect(
        error(403, {"error": {"message": "Your chosen model requires moderation and your input was flagged", "code": 403}}),
        "content_filter",
        "your input was flagged",
    ),
    "Azure's filter": Dialect(
        error(400, {"error": {"message": "The response was filtered.", "code": "content_filter", "param": "prompt"}}),
        "content_filter",
        "was filtered",
    ),
    "DashScope's filter": Dialect(
        error(400, {"code": "data_inspection_failed", "message": "Input data may be bad."}), "content_filter", "Input data"
    ),
    "DeepSeek's filter": Dialect(error(400, {"error": {"message": "Content Exists Risk"}}), "content_filter", "Exists Risk"),
    "llama.cpp's context": Dialect(
        error(400, {"error": {"code": 400, "message": "the request exceeds the available context size"}}),
        "context_length",
        "context size",
    ),
    "Anthropic's context": Dialect(
        error(400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}}),
        "context_length",
        "prompt is too long",
    ),
    "a gateway's limit": Dialect(
        error(413, b"<html><title>413 Payload Too Large</title></html>"), "context_length", "413 Payload"
    ),
    "OpenAI": Dialect(lambda text: failure(400, "Odd prompt.", "odd"), "bad_request", "Odd prompt."),
    "a text": Dialect(error(400, {"error": "odd text"}), "bad_request", "odd text"),
    "FastAPI": Dialect(error(422, {"detail": "odd detail"}), "bad_request", "odd detail"),
    "FastAPI, a list": Dialect(
        error(422, {"detail": [{"loc": ["body", "messages", 0], "msg": "odd field", "type": "value_error"}]}),
        "bad_request",
        "body.messages.0: odd field",
    ),
    "a message": Dialect(error(400, {"message": "odd message"}), "bad_request", "odd message"),
    "errors": Dialect(error(400, {"errors": [{"message": "odd one"}, "odd two"]}), "bad_request", "odd one; odd two"),
    "error: null, too": Dialect(error(400, {"error": None, "msg": "odd null"}), "bad_request", "odd null"),
    "Google's list": Dialect(
        error(400, [{"error": {"code": 400, "message": "odd list", "status": "INVALID_ARGUMENT"}}]), "bad_request", "odd list"
    ),
    "plain text": Dialect(error(400, b"odd words\nand more"), "bad_request", "odd words"),
    "HTML": Dialect(error(400, b"<html><head><title>Odd\n page</title></head><p>x</html>"), "bad_request", "Odd page"),
    "HTML without title": Dialect(
        error(400, b"<html><style>b{}</style><b>Odd</b> &amp; bare</html>"), "bad_request", "Odd & bare"
    ),
    "a provider's words": Dialect(
        error(400, {"error": {"message": "Provider returned error", "metadata": {"raw": '{"error":"odd raw"}'}}}),
        "bad_request",
        "odd raw",
    ),
    "400 inside a 200": Dialect(
        error(200, {"choices": None, "error": {"code": 400, "message": "odd inside"}}), "bad_request", "odd inside"
    ),
    "a key in the words": Dialect(
        error(400, {"error": f"odd key sk-test, Bearer abcdefgh, {'0a1b2c3d' * 4} of gpt-4o-mini-2024-07-18"}),
        "bad_request",
        "odd key *** *** *** of gpt-4o-mini-2024-07-18",
    ),
}

# What passes: the request is sent again, and gets its text then.
PASSES = {
    "OpenRouter's 429 inside a 200": error(200, {"choices": None, "error": {"code": 429, "message": "Slow down."}}),
    "429 as a text": error(200, {"error": {"code": "429", "message": "Slow down."}}),
    "a word for 429": error(200, {"error": {"code": "rate_limit_exceeded", "message": "Slow down."}}),
    "502 inside a choice": lambda text: Answer(
        200,
        {"choices": [{"message": {"content": "half a"}, "finish_reason": "error", "error": {"code": 502, "message": "Lost."}}]},
    ),
    "vLLM's error object": error(200, {"object": "error", "message": "Engine is dead.", "code": 500}),
    "a word for 500": error(200, {"error": {"type": "server_error", "message": "Lost."}}),
    "a word that nobody knows": error(200, {"error": {"code": "E17", "message": "Lost."}}),
    "no choices": error(200, {"choices": []}),
    "overloaded": error(529, {"error": {"type": "overloaded_error", "message": "Overloaded"}}),
}

# What no request can mend. Exit code, and words that the error shows.
ENDS = {
    "OpenRouter, no credit": (
        error(402, {"error": {"code": 402, "message": "Insufficient credits."}}),
        1,
        "Insufficient credits.",
    ),
    "DeepSeek, no credit": (error(402, {"error": {"message": "Insufficient Balance"}}), 1, "Insufficient Balance"),
    "quota": (lambda text: failure(429, "You exceeded your current quota.", "insufficient_quota"), 1, "current quota"),
    "Zhipu, no credit": (
        error(429, {"error": {"code": "1113", "message": "Insufficient balance or no package"}}),
        1,
        "Insufficient",
    ),
    "billing limit": (
        lambda text: failure(400, "Billing hard limit has been reached", "billing_hard_limit_reached"),
        1,
        "Billing hard limit",
    ),
    "billing": (
        lambda text: failure(429, "Your account is not active, check your billing details.", "billing_not_active"),
        1,
        "not active",
    ),
    "closed": (lambda text: failure(401, "The account has been deactivated.", "account_deactivated"), 1, "deactivated"),
    "SiliconFlow": (error(403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}), 1, "is insufficient"),
    "Anthropic, no credit": (
        error(400, {"error": {"message": "Your credit balance is too low to access the API."}}),
        1,
        "too low",
    ),
    "quota inside a 200": (error(200, {"error": {"code": "insufficient_quota", "message": "All used."}}), 1, "All used."),
    "key": (lambda text: failure(401, "Incorrect API key provided: sk-t****st.", "invalid_api_key"), 2, "Incorrect API key"),
    "key inside a 200": (error(200, {"error": {"code": 401, "message": "User not found."}}), 2, "User not found."),
    "region": (error(403, {"error": {"message": "Country, region, or territory not supported"}}), 2, "territory not supported"),
    "right": (error(403, {"detail": "You have no permission for judge"}), 2, "no permission"),
    "model": (lambda text: failure(404, "The model `judge` does not exist", "model_not_found"), 2, "`judge` does not exist"),
    "Ollama, model": (error(404, {"error": 'model "judge" not found, try pulling it first'}), 2, "try pulling it"),
}

# The first request of a run is refused so: it ends there (exit 2), after one request.
AT_FIRST = {
    "model": (error(400, {"error": {"message": "Unknown model: judge"}}), "Unknown model: judge"),
    "key": (error(400, [{"error": {"code": 400, "message": "API key not valid.", "status": "INVALID_ARGUMENT"}}]), "not valid"),
    "streaming": (error(400, {"error": "This model is streaming only"}), "streaming only"),
    "role": (error(422, {"detail": [{"loc": ["body"], "msg": "role must be system"}]}), "role must be system"),
    "forbidden": (error(403, b"<html><h1>Forbidden</h1></html>"), "Forbidden"),
    "size": (lambda text: failure(400, "max_tokens is too large: 400. At most 300 are supported.", None), "is too large"),
    "inside": (error(200, {"object": "error", "message": "odd model", "code": 400}), "odd model"),
}
