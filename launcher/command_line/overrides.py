"""Values as overrides take them."""

from __future__ import annotations

import re


def quoted(value: object) -> str:
    """Return a value as an override takes it whatever it holds: spaces, commas, quotes, dollar signs."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", text):
        return text
    # Backslashes are taken as they stand, but for those in front of a quote, which are doubled.
    text = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    text = re.sub(r"(\\+)$", lambda found: 2 * found[1], text)
    return "'" + text.replace("${", "\\${") + "'"
