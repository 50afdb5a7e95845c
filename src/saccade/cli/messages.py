"""What is said of an error."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """The error's message on one line; its type before it where the message alone would not say what went wrong."""
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, ImportError)) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
