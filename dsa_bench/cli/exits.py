"""The exit codes of every command."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    USAGE = 2
    FAILED = 3
    """Some case failed, was wrong, did not fit, took too long, or fails on a hostile input."""
    REGRESSION = 4
    INTERRUPTED = 130
