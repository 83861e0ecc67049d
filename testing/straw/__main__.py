"""One rank of a run on a GPU of straw: python -m testing.straw rank=917 world=2048 local=5 recipe=... key=value ...

Trains with the project's own trainer and prints, as the last line, what was counted, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings

from testing.straw.library import load

warnings.filterwarnings("ignore")


def main(words: list[str]) -> int:
    """Run; return the exit code."""
    library = load()
    given = dict(word.split("=", 1) for word in words[:3])
    from testing.straw.rank import run_rank  # imports torch

    found = run_rank(library, int(given["rank"]), int(given["world"]), int(given["local"]), words[3:])
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
