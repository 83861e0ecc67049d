"""Work on token shards, and see what runs read of them: python launcher/data.py COMMAND key=value ...

    python launcher/data.py trace run=RUN_DIRECTORY step=N     the documents of a step by name, as JSON lines
    python launcher/data.py merge input=A,B output=C           parts or folders of shards joined into one
    python launcher/data.py pack data=FOLDER                   documents packed into sequences before a run does it
    python launcher/data.py check data=FOLDER                  every byte of shards compared with their checksums

Keys are those of the command: python launcher/data.py COMMAND --help tells all of one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from launcher.command_line.arguments import HELP
from launcher.command_line.console import guarded
from launcher.command_line.schema import nearest
from launcher.command_line.typed import as_typed
from parallel.errors import RecipeError

COMMANDS = ("trace", "merge", "pack", "check")  # modules of launcher/data_commands


def main(words: Sequence[str]) -> int:
    """Run the command that the first word names; return its exit code."""
    if not words or words[0] in HELP:
        print(as_typed((__doc__ or "").strip()))
        return 0 if words else 2
    name, *rest = words
    if name not in COMMANDS:
        raise RecipeError(f"{name} is not a command of data; {nearest(name, COMMANDS)}there are: {', '.join(COMMANDS)}")
    # A command imports what it needs, some of it torch: the others' help should not wait for that.
    return int(importlib.import_module(f"launcher.data_commands.{name}").main(rest))


if __name__ == "__main__":
    sys.exit(guarded(main))
