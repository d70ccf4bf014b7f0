"""What errors of servers mean: their own words, from status and body to the reason that decides what follows."""

import pytest

from syntriever.llm import refusals

OPENAI_QUOTA = "You exceeded your current quota, please check your plan and billing details."
GOOGLE_QUOTA = OPENAI_QUOTA + " * Quota exceeded for metric: x, limit: 10\nPlease retry in 38.1s."
TOO_LONG = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"
TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1800 `inputs` tokens"
XAI = "Your team has either used all available credits or reached its monthly spending limit."
AZURE = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
ADD_CARD = "Rate limit reached on requests per min. Please add a payment method to your account to increase your rate limit."


def openai(message, **fields):
    return {"error": {"message": message, **fields}}


MEANT = {
    "no_credit": [
        (402, ""),
        (402, openai("This request requires more credits, or fewer max_tokens.")),
        (429, openai(OPENAI_QUOTA, type="insufficient_quota", code="insufficient_quota")),
        (429, openai("Your account x is suspended, please check your plan", type="exceeded_current_quota_error")),
        (429, openai("余额不足或无可用资源包,请充值。", code="1113")),
        (403, {"code": "The caller does not have permission", "error": XAI}),
        (403, {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None}),
        (400, {"code": "Arrearage", "message": "Access denied, please make sure your account is in good standing."}),
        (400, openai("Budget has been exceeded! Current cost: 1.0, Max budget: 1.0", type="budget_exceeded")),
        (401, openai("The account associated with this API key has been deactivated.", code="account_deactivated")),
        (0, openai("All used.", code="insufficient_quota")),
    ],
    "rate_limited": [
        (429, [openai(GOOGLE_QUOTA, code=429, status="RESOURCE_EXHAUSTED")]),
        (429, openai(ADD_CARD, code="rate_limit_exceeded")),
        (429, {"message": "Service tier capacity exceeded for this model.", "code": "3505"}),
        (0, openai("Rate limit exceeded", type="rate_limit_error")),
        (0, openai("Provider returned error", code=429, metadata={"raw": "temporarily rate-limited upstream"})),
    ],
    "no_access": [
        (401, {"detail": "Unauthorized"}),
        (401, openai("Authentication Fails (no such user)")),
        (403, openai("Country, region, or territory not supported", code="unsupported_country_region_territory")),
        (403, openai("You have insufficient permissions for this operation.")),
        (403, openai("Project `p` does not have access to model `judge`", code="model_not_found")),
        (403, openai("Key limit exceeded (total limit).", code=403)),
        (403, "<html><head><title>Access denied | x.com used Cloudflare to restrict access</title></head></html>"),
        (0, {"base_resp": {"status_code": 1004, "status_msg": "login fail: Please carry the API secret key"}}),
    ],
    "not_found": [
        (404, {"error": "model 'judge' not found"}),
        (405, {"detail": "Method Not Allowed"}),
        (410, {"error": "This model is no longer served"}),
        (0, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
    ],
    "content_filter": [
        (400, openai(AZURE, code="content_filter")),
        (
            400,
            openai("Invalid prompt: your prompt was flagged as potentially violating our usage policy.", code="invalid_prompt"),
        ),
        (400, openai("系统检测到输入或生成内容可能包含不安全或敏感内容", code="1301")),
        (403, openai('judge requires moderation on OpenRouter. Your input was flagged for "violence".', code=403)),
        (403, openai("Content violates usage guidelines. Team: t, API key ID: k")),
        (403, openai("This content is not permitted")),
        (0, openai("Your input was flagged", code=403)),
        (451, {"error": "content policy"}),
    ],
    "context_length": [
        (400, {"object": "error", "message": TOO_LONG}),
        (400, openai("Input length 5000 exceeds maximum allowed token count 4096")),
        (400, openai("Invalid 'messages[0].content': string too long.", code="string_above_max_length")),
        (422, {"error": TGI, "error_type": "validation"}),
        (413, {"error": "Request too large"}),
        (0, openai("too long", code="context_length_exceeded")),
    ],
    "bad_request": [
        (400, openai("Unsupported parameter: 'temperature'", code="unsupported_parameter")),
        (400, openai("max_tokens (400) exceeds the limit of 300")),
        (400, openai("Requested max_tokens 400 exceeds maximum of 256 tokens")),
        (400, openai("Model names are case-sensitive")),
        (400, openai('messages: roles must alternate; first message must use the "user" role')),
        (400, openai("API key not valid. Please pass a valid API key.", status="INVALID_ARGUMENT")),
        (403, {"error": "Forbidden"}),
        (501, openai("not supported")),
        (418, {}),
        (0, {"code": 400, "message": "odd"}),
    ],
    "bad_body": [(0, {}), (0, ""), (0, openai("Odd.", code="E17"))],
    "http_503": [(503, openai("Loading model", code=503)), (0, openai("Service overloaded")), (503, openai("Out of credits"))],
    "http_500": [(500, openai("insufficient memory")), (0, openai("Internal Server Error", code=500))],
    "http_529": [(529, openai("Overloaded", type="overloaded_error"))],
    "http_408": [(408, {})],
    "proxy": [(407, "<html>authenticate</html>")],
}


@pytest.mark.parametrize("reason", MEANT)
def test_what_errors_mean(reason):
    found = [(status, body, refusals.read(status, body).reason) for status, body in MEANT[reason]]
    assert [error for error in found if error[2] != reason] == []


def test_errors_of_any_shape_are_read():
    """No shape of a body ends in a traceback."""
    odd = [None, 5, True, [], {}, "", [None], [[]], {"error": []}, {"error": {"message": {"message": 5}}}, {"detail": [5, None]}]
    odd += [
        {"error": {"code": ["x"], "metadata": 5}},
        {"errors": {"a": ["b"]}},
        {"loc": 5, "msg": 5},
        "<html>",
        "<title></title>",
    ]
    for body in odd:
        for status in (0, 200, 400, 403, 429, 500):
            assert isinstance(refusals.read(status, body).words, str)
        assert refusals.inside(body) is None or refusals.inside(body).reason
