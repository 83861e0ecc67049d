"""Ranks of a run on GPUs of straw, one after the other: python -m testing.straw 0 899 local=3 of=2048 KEY=VALUE ...

Each rank, on the GPU of that local rank, trains with the project's own trainer, in a run directory of its own; printed
is, as the last line, what was counted of each (testing.straw.rank.run_rank), as JSON. With backend=te Transformer
Engine's own Python is at hand (testing/te).
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings

from testing.straw.library import load

warnings.filterwarnings("ignore")


def main(words: list[str]) -> int:
    """Run; return the exit code."""
    library = load()  # before torch is imported
    if "backend=te" in words:
        from testing.te.install import install

        install(on_cpu=False)
    from testing.straw.cuda import pretend_cuda
    from testing.straw.rank import run_rank
    from testing.straw.record import Record

    record = Record()
    pretend_cuda(library, record)

    ranks = list(itertools.takewhile(str.isdigit, words))
    local, world, *overrides = words[len(ranks) :]
    place = int(local.removeprefix("local=")), int(world.removeprefix("of="))
    found = [run_rank(record, int(r), *place, [word.replace("{rank}", r) for word in overrides]) for r in ranks]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
