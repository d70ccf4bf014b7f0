"""Addresses, keys and proxies: what is mended, and what is named before anything is paid. No key in any message."""

import base64
import json
import os
import socket
import urllib.parse

import pytest
from conftest import load_script
from llm_lab import COMPARISON, SYNTHESIS, asked, rows
from llm_server import Answer, LLMServer, failure

from syntriever.errors import BadInput
from syntriever.files import paths
from syntriever.llm import address, refusals, teachers

KEY = "sk-canary-2f6b1c"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    """Neither proxies nor Azure of the machine."""
    for name in list(os.environ):
        if name.lower() in PROXIES or name.startswith(("AZURE_", "OPENAI_")):
            monkeypatch.delenv(name)


@pytest.fixture
def at(lab, run_script):
    """at(address, *options, code=0): what synthesis printed, or said on stderr if it failed."""

    def at(url, *options, code=0, llm="judge"):
        given = ["--base-url", url] if url else []
        found, out, err = run_script(SYNTHESIS, "tiny", "--llm", llm, *given, "--attempts", 1, *options)
        assert found == code, (found, err)
        return err if code else out

    return at


@pytest.fixture
def dead_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


# --- addresses


@pytest.mark.parametrize("end", ["/", "//", "/chat/completions", "/chat/completions/", "/completions", "/models", "/chat"])
def test_pasted_path_is_cut_back(at, end):
    with LLMServer() as server:
        at(server.url + end, "--limit", 1)
        assert set(server.targets) == {"POST /v1/chat/completions"}
    assert len(rows(paths.synthetic("tiny"))) == 1


@pytest.mark.parametrize("path", ["", "/chat/completions", "/"])
def test_query_survives(at, monkeypatch, path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LLMServer() as server:
        at(f"{server.url}{path}?api-version=2024-10-21&x=a%20b", "--limit", 1)
        assert set(server.targets) == {"POST /v1/chat/completions?api-version=2024-10-21&x=a+b"}
        assert {headers["api-key"] for headers in server.headers_seen} == {KEY}  # Azure wants it under this name


@pytest.mark.parametrize("options", [[], ["--batch"]])
def test_missing_version_is_added_once(at, options):
    codes = [75, 75, 0] if options else [0]
    with LLMServer(batch_polls=0) as server:
        root = server.url.removesuffix("/v1")
        for code in codes:
            said = at(root, *options, "--limit", 3, code=code)
        assert f"trying {root}/v1" in said
    assert len(rows(paths.synthetic("tiny"))) == 3
    lost = [target for target in server.targets if not target.partition(" ")[2].startswith("/v1/")]
    assert len(lost) == len(codes)  # one in each run


def test_version_is_added_only_where_it_may_help(at):
    with LLMServer(models=["another"]) as server:
        said = at(server.url, code=2)
        assert "no such model (or no such path): The model `judge` does not exist" in said
        assert len(server.targets) == 1
        said = at(server.url.removesuffix("/v1") + "/api", code=2)
        assert server.url.replace("/v1", "/api/v1") in said
        assert len(server.targets) == 3


BAD_ADDRESSES = [
    "localhost:8000/v1",
    "127.0.0.1:8000",
    "example.com",
    "http://",
    "http:/x/v1",
    "http://a:port/v1",
    "http://[::1/v1",
]
BAD_ADDRESSES += [
    "ftp://example.com/v1",
    "http://a b/v1",
    "http://127.0.0.1:99999/v1",
    "https//example.com",
    "//example.com",
    "sk-x",
]


@pytest.mark.parametrize("name", ["--base-url", "OPENAI_BASE_URL"])
@pytest.mark.parametrize("url", BAD_ADDRESSES)
def test_bad_address_is_named_and_says_how(at, monkeypatch, url, name):
    if name == "OPENAI_BASE_URL":
        monkeypatch.setenv(name, url)
    said = at(url if name == "--base-url" else None, code=2)
    assert said.startswith(f"error: {name} ")
    assert "http://" in said


def test_key_in_place_of_an_address_is_not_shown(at):
    assert "canary" not in at(KEY, code=2)


def test_password_of_an_address_is_not_shown(at, dead_port):
    for url in (f"http://me:{KEY}@127.0.0.1:{dead_port}/v1?key={KEY}", f"me:{KEY}@host/v1?key={KEY}"):
        assert KEY not in at(url, code=1 if "://" in url else 2)


# --- Azure


@pytest.mark.parametrize("batch", [[], ["--batch"]])
def test_azure(at, monkeypatch, batch):
    with LLMServer(root="/openai", api_key=KEY, batch_polls=0) as server:
        root = server.url.removesuffix("/v1")
        monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", root + "/")
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", f" {KEY}\n")
        assert "OPENAI_API_VERSION" in at(None, code=2)
        monkeypatch.setenv("OPENAI_API_VERSION", "2024-10-21")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
        for code in (75, 75, 0) if batch else (0,):
            at(None, *batch, "--limit", 2, code=code)
        assert len(rows(paths.synthetic("tiny"))) == 2
        chats = [target for target in server.targets if "chat" in target]
        assert set(chats) == {"POST /openai/deployments/judge/chat/completions?api-version=2024-10-21"}
        assert all("api-version=2024-10-21" in target and " /openai/" in target for target in server.targets)
        monkeypatch.setenv("AZURE_OPENAI_API_KEY", "sk-wrong-for-this")
        said = at(None, "--limit", 3, code=2)
        assert "refused the key in AZURE_OPENAI_API_KEY" in said
        assert "wrong-for" not in said


def test_azure_without_a_key(at, monkeypatch):
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://x.openai.azure.com")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "AZURE_OPENAI_API_KEY is not" in at(None, code=2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert not address.of("judge", None).azure
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://x.openai.azure.com/openai/deployments/d/chat/completions?api-version=1")
    options = address.of("judge", None).options
    assert (options["azure_endpoint"], options["api_version"]) == ("https://x.openai.azure.com", "1")
    assert not address.of("judge", "http://localhost:1/v1").azure


# --- a name that is also a folder


@pytest.mark.parametrize("script", [SYNTHESIS, COMPARISON])
def test_server_is_meant_where_a_name_is_a_folder_too(lab, tmp_path, monkeypatch, script):
    folder = tmp_path / "models" / "judge"
    folder.mkdir(parents=True)
    parse = load_script(script).parse_args
    for name, given, env, where in (
        (str(folder), ["--base-url", "http://localhost:1/v1"], "", "OpenAITeacher"),
        (str(folder), [], "http://localhost:1/v1", "OpenAITeacher"),
        ("smollm2", ["--base-url", "http://localhost:1/v1"], "", "OpenAITeacher"),
        (str(folder), [], " ", None),
    ):
        monkeypatch.setenv("OPENAI_BASE_URL", env)
        args = parse(["tiny", "--llm", name, *given])
        if where:
            teacher = teachers.make_teacher("tiny", paths.synthetic("tiny"), args)
            assert (type(teacher).__name__, teacher.model) == (where, name)
        else:
            with pytest.raises(BadInput, match="only a GGUF file runs here"):
                teachers.make_teacher("tiny", paths.synthetic("tiny"), args)


# --- keys


@pytest.mark.parametrize("around", [" {}", "{}\n", "\t{}\r\n", '"{}"', "\ufeff{}", "\xa0{}\xa0", "'{}'\n"])
def test_white_space_around_a_key_is_cut(at, monkeypatch, around):
    monkeypatch.setenv("OPENAI_API_KEY", around.format(KEY))
    with LLMServer(api_key=KEY) as server:
        at(server.url, "--limit", 1)


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
@pytest.mark.parametrize(
    "key", ["sk-can\nary", "sk–canary", "sk-can ary", "sk-canary\x07x", "sk-canäry", "“sk-canary”", "sk-can\u200bary"]
)
def test_key_that_is_none_is_named_and_not_shown(at, monkeypatch, name, key):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, key)
    with LLMServer() as server:
        said = at(server.url, code=2)
        assert not server.targets
    assert said.startswith(f"error: {name} ")
    assert not any(part in said for part in ("canary", "can", "ary"))


def test_server_that_wants_a_key(at, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    answer = Answer(401, {"error": "You have none of our keys."})
    with LLMServer(says=lambda body, attempt: answer) as server:
        assert "wants the key of an account, in OPENAI_API_KEY: You have none of our keys." in at(server.url, code=2)


FORMS = {
    "whole": KEY,
    "capitals": KEY.upper(),
    "its end": "*****" + KEY[-9:],
    "its beginning": KEY[:11] + "***",
    "in a header": f"Authorization: Bearer {KEY}",
    "in quotes": f"{{'api_key': '{KEY}'}}",
    "in an address": f"https://x/v1?key={KEY}&y",
    "quoted": urllib.parse.quote(KEY + "+/="),
    "as base64": "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode(),
    "as hex": KEY.encode().hex(),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_form_of_the_key_is_passed_on(at, monkeypatch, lab, form):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    long = f"Odd thing {FORMS[form]} was sent. " + "x " * 200 + FORMS[form]
    hidden = {KEY, KEY.upper(), KEY[-9:], KEY[:11], FORMS[form]}
    answers = [failure(400, long, None), Answer(500, {"detail": long}), Answer(400, long.encode()), Answer(401, {"error": long})]
    for answer in answers:
        with LLMServer() as server:
            server.says = lambda body, attempt, answer=answer, server=server: answer if len(server.requests) > 4 else None
            code = 2 if answer.status == 401 else 1
            said = at(server.url, "--limit", 4, "--force", "--concurrency", 1, code=code)
        assert "Odd thing" in said or code == 1
        written = [path.read_text("utf-8", "replace") for path in lab.rglob("*") if path.is_file()]
        failed = paths.failed(paths.synthetic("tiny"))
        if code == 1:
            assert "Odd thing" in failed.read_text()
            assert max(len(row["message"]) for row in rows(failed)) <= 300
        assert not [part for part in hidden for text in [*written, said] if part in text]
        for path in (paths.synthetic("tiny"), paths.synthesis_ledger("tiny")):
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "words",
    [
        "The model `deepseek-ai/DeepSeek-R1-Distill-Qwen-32B` does not exist",
        "model accounts/fireworks/models/llama-v3p1-405b-instruct-turbo not found",
        "Unsupported parameter: 'max_completion_tokens' with claude-3-5-sonnet-20241022",
        "No route for POST /v1/chat/completions?api-version=2024-10-21 at https://api.example.com/v1",
        "Missing bearer token: set your API key",
        "token limit: 4096 of gpt-4o-mini-2024-07-18, key: Field required",
    ],
)
def test_words_that_are_no_key_stay(words):
    assert refusals.spoken(words, [KEY]) == words


def test_words_are_one_line_without_control_characters():
    assert refusals.spoken("\n\n \x1b[31mOdd\x1b[0m \t thing\r\nmore") == "[31mOdd [0m thing"
    assert len(refusals.spoken("word " * 500)) <= 300


# --- proxies

UNUSABLE = {"socks5://127.0.0.1:1": "socksio", "socks5h://me:secret@127.0.0.1:1": "socksio", "socks4://127.0.0.1:1": "is none"}
UNUSABLE |= {
    "ftp://127.0.0.1:1": "is none",
    "http://127.0.0.1:port": "is none",
    "http://[::1": "is none",
    "socks://h:1": "is none",
}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("url", UNUSABLE)
def test_proxy_that_cannot_be_used_is_named(at, monkeypatch, name, url):
    monkeypatch.setenv(name, url)
    said = at("http://127.0.0.1:1/v1", code=2)
    assert said.startswith(f"error: {name}: ")
    assert url.rpartition("@")[2].rpartition("//")[2] in said
    assert UNUSABLE[url] in said
    assert "secret" not in said
    monkeypatch.setenv("NO_PROXY", "*")
    assert "does not answer" in at("http://127.0.0.1:1/v1", code=1)


@pytest.mark.parametrize("batch", [[], ["--batch"]])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_dead_proxy_is_named_in_place_of_the_server(at, monkeypatch, dead_port, name, batch):
    monkeypatch.setenv(name, f"http://me:secret@127.0.0.1:{dead_port}")
    with LLMServer() as server:
        said = at(server.url, *batch, "--attempts", 6, code=2)
        assert f"the proxy 127.0.0.1:{dead_port} ({name}) does not answer" in said
        assert "secret" not in said
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        at(server.url, "--limit", 1)


def test_dead_proxy_of_https(at, monkeypatch, dead_port):
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{dead_port}")
    assert f"the proxy 127.0.0.1:{dead_port} (HTTPS_PROXY) does not answer" in at("https://example.invalid/v1", code=2)
    assert "the server at http://127.0.0.1:1/v1 does not answer (connection: " in at("http://127.0.0.1:1/v1", code=1)


def test_proxy_that_answers_itself(at, monkeypatch):
    answers = {407: "wants a name and a password", 403: "refused the first request: Blocked page"}
    for status, words in answers.items():

        class Proxy(LLMServer):
            def _other(self, what, headers, raw, status=status):
                return Answer(status, b"<html><title>Blocked page</title></html>")

        with Proxy() as server:
            monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
            said = at("http://judge.invalid/v1", code=2)
        assert words in said
        assert f"127.0.0.1:{server.port} (HTTP_PROXY)" in said


def test_words_of_a_server_that_is_down_are_shown(at):
    with LLMServer(says=lambda body, attempt: Answer(503, {"error": {"message": "Loading model"}})) as server:
        assert "does not answer (http_503: Loading model)" in at(server.url, code=1)
        asked(server)
        server.says = lambda body, attempt: Answer(200, b"<html><title>Sign in</title></html>")
        assert "does not answer (bad_body: Sign in)" in at(server.url, code=1)
    assert json.loads(paths.run_json(paths.synthetic("tiny")).read_text())["complete"] is False
