"""What a stage says while it works: a bar on a terminal, few plain lines in a file."""

import contextlib
import io
import time

import pytest

from syntriever.run import terminal


class Stderr(io.StringIO):
    tty = False

    def isatty(self):
        return self.tty


@pytest.fixture
def stderr():
    return Stderr()


def work(stderr, seconds, **options):
    with contextlib.redirect_stderr(stderr), terminal.progress(total=10_000, desc="encode", unit="passage", **options) as bar:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            bar.update()
            bar.set_postfix(loss="0.5", refresh=False)
            time.sleep(0.001)


def test_a_file_gets_a_plain_line_now_and_then(stderr, monkeypatch):
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.1)
    work(stderr, 0.45, delay=0)
    lines = stderr.getvalue().splitlines()
    assert "\r" not in stderr.getvalue()
    assert all(line.startswith("encode:") and "passage" in line for line in lines)
    assert 3 <= len(lines) <= 6


def test_a_file_gets_nothing_of_what_is_quick(stderr):
    work(stderr, 0.05, delay=0)
    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_of_what_takes_longer_than_the_delay(stderr):
    stderr.tty = True
    work(stderr, 0.05)
    assert stderr.getvalue() == ""
    work(stderr, 0.3, delay=0.1)
    assert stderr.getvalue().count("\r") > 1


def test_only_the_first_process_shows_one(stderr, monkeypatch):
    stderr.tty = True
    monkeypatch.setenv("RANK", "1")
    work(stderr, 0.05, delay=0)
    assert stderr.getvalue() == ""
