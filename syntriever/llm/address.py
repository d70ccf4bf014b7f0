"""Where the teacher is, with which key and by which proxy: what can be found wrong before the first request."""

import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import proxy_bypass

from syntriever.errors import BadInput
from syntriever.llm.refusals import spoken

OPENAI = "https://api.openai.com/v1"
NO_KEY = "none"  # what a server gets that wants no key


@dataclass(frozen=True)
class Address:
    """`options` are those of the client; `key_name` is the variable of the key; `given` is False for OpenAI itself, and `here`
    is True of a server that this process has started."""

    options: dict[str, Any]
    key_name: str = "OPENAI_API_KEY"
    azure: bool = False
    given: bool = True
    here: bool = False


def of(model: str, base_url: str | None, asks: bool = True) -> Address:
    """The server that `--base-url` or the environment names; `BadInput` where an address or a key is none. Who does not ask it
    (`--dry-run`) needs no key."""
    name = "--base-url" if base_url else "OPENAI_BASE_URL"
    base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "").strip()
    endpoint, key = os.environ.get("AZURE_OPENAI_ENDPOINT", "").strip(), _secret("OPENAI_API_KEY")
    options: dict[str, Any] = {"organization": _secret("OPENAI_ORG_ID"), "project": _secret("OPENAI_PROJECT_ID")}
    if endpoint and not base_url:
        azure, token = _secret("AZURE_OPENAI_API_KEY"), _secret("AZURE_OPENAI_AD_TOKEN")
        if azure or token or not key:
            return Address(options | _azure(endpoint, azure, token), "AZURE_OPENAI_API_KEY", azure=True)
    if not key and not base_url and asks:
        raise BadInput(
            f"--llm {model}: OPENAI_API_KEY is not set. Set it, or point --base-url at a local server, or use --llm gguf:FILE"
        )
    url, query = _split(base_url or OPENAI, name)
    if key and "api-version" in query:  # Azure under its plain address
        options["default_headers"] = {"api-key": key}
    return Address(options | {"api_key": key or NO_KEY, "base_url": url, "default_query": query}, given=bool(base_url))


def local(url: str) -> Address:
    """Of a server that this process has started: no variable for another one, no key and no proxy, is for it."""
    return Address({"api_key": NO_KEY, "organization": "", "project": "", "base_url": url}, here=True)


def _azure(endpoint: str, key: str | None, token: str | None) -> dict[str, Any]:
    url, query = _split(endpoint, "AZURE_OPENAI_ENDPOINT")
    version = query.pop("api-version", None) or _secret("OPENAI_API_VERSION")
    if not (key or token):
        raise BadInput("AZURE_OPENAI_ENDPOINT is set, but AZURE_OPENAI_API_KEY is not")
    if not version:
        raise BadInput("AZURE_OPENAI_ENDPOINT is set, but OPENAI_API_VERSION is not; it is a date such as 2024-10-21")
    options = {"api_key": key} if key else {"azure_ad_token": token}
    return options | {"azure_endpoint": re.sub(r"/openai(/.*)?$", "", url), "api_version": version, "default_query": query}


def _split(text: str, name: str) -> tuple[str, dict[str, str]]:
    """Address without a pasted path of a request, and its query."""
    import httpx2

    text = text.strip("'\"")
    try:
        parts = urlsplit(text)
        plain = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and not re.search(r"\s", text)
        httpx2.URL(text)
    except (ValueError, httpx2.InvalidURL):
        plain = False
    if not plain:
        shown = spoken(text.rpartition("@")[2].partition("?")[0])
        how = "an address begins with http:// or https://" if "://" in text else f"write http://{shown} (or https://{shown})"
        raise BadInput(f"{name} {shown}: not the address of a server, such as http://localhost:8000/v1; {how}")
    path = re.sub(r"(?:(?:/chat)?/completions|(?<=/v1)/(?:chat|models|responses|embeddings))/*$", "", parts.path.rstrip("/"))
    return parts._replace(path=path, query="", fragment="").geturl(), dict(parse_qsl(parts.query, keep_blank_values=True))


def _secret(name: str) -> str | None:
    """A variable as it can stand in a header; blanks, line ends and quotes around it are cut."""
    value = os.environ.get(name, "").strip().strip("'\"\ufeff").strip()
    if not value.isascii() or not value.isprintable() or " " in value:
        raise BadInput(
            f"{name} holds a blank, a line break or a character that is not ASCII (a dash?); no key does: set it again"
        )
    return value or None


def shown(url: Any) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(str(url))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl().rstrip("/")


def proxy_of(url: Any) -> str:
    """The proxy that an address is reached by, and the variable that names it; empty where none is."""
    parts = urlsplit(str(url))
    if proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    for wanted in (f"{parts.scheme}_proxy", "all_proxy"):
        for name in sorted(os.environ, reverse=True):  # lower case before upper case, as the client has it
            if name.lower() == wanted and os.environ[name]:
                return f"{shown_proxy(name)} ({name})"
    return ""


def shown_proxy(name: str) -> str:
    return "the proxy " + os.environ[name].rpartition("@")[2]


def wrong_proxy(error: Exception) -> BadInput:
    """What to say where the client cannot be made: it fails at a proxy that it cannot speak to."""
    import httpx2

    for name, value in os.environ.items():
        if value and name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            try:
                httpx2.AsyncHTTPTransport(proxy=value if "://" in value else f"http://{value}")
            except ImportError:
                return BadInput(f"{name}: {shown_proxy(name)} speaks SOCKS: pip install socksio, or unset {name}")
            except (ValueError, httpx2.InvalidURL):
                how = "correct or unset it, or name the server in NO_PROXY"
                return BadInput(f"{name}: {shown_proxy(name)} is none that can be used (http, https, socks5); {how}")
    return BadInput(f"the client cannot be made: {error}")
