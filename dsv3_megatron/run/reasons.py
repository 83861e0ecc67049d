"""Why something failed, in the words that go into one line."""

from __future__ import annotations

from pydantic import ValidationError


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: Exception) -> str:
    """Return why, in one line: what the system says, or the first line of what the error says."""
    return getattr(error, "strerror", None) or first_line(error)


def why_unread(error: Exception) -> str:
    """Return in a line why a file cannot be read: what the system says, the first thing that is wrong with its content,
    or what the error says."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole of it'}: {first['msg']}"
    return str((error.strerror or error) if isinstance(error, OSError) else error)
