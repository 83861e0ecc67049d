"""Tables that a program writes into a page: each stands between ``<!-- table NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from collections.abc import Mapping

_TABLE = re.compile(r"(<!-- table (\w+) -->\n)(?:(?!<!-- end -->).*\n)*(<!-- end -->)")


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with its tables written anew. Raises KeyError: it asks for a table that there is not."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n\n{found[3]}", page)
