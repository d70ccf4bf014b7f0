"""The two ways a stage may end badly."""


class BadInput(Exception):
    """Bad arguments or bad input, found before anything expensive: exit 2."""


class Failed(Exception):
    """A failure while running; what was made so far is kept: exit 1."""
