"""The ways a stage may end without its output."""


class BadInput(Exception):
    """Bad arguments or bad input, found before anything expensive: exit 2."""


class Failed(Exception):
    """A failure while running; what was made so far is kept: exit 1."""


class Waiting(Exception):
    """Nothing went wrong, but others need more time; the same command goes on later: exit 75."""
