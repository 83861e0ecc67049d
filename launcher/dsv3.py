"""dsv3 COMMAND key=value ...: every command of the project under one name, from any directory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from launcher.command_line.completion import bash_completion
from launcher.command_line.console import guarded
from launcher.command_line.schema import nearest
from launcher.command_line.start_ranks import train
from launcher.command_line.typed import COMMANDS
from parallel.errors import RecipeError

HELP = """
dsv3 COMMAND key=value ...: pretrain DeepSeek-V3-class models

  train            train a recipe; --nproc-per-node N starts N ranks by torchrun, whose other options it takes too
  plan             does a recipe fit, how fast will it be; no GPU
  schedule         validate, time and draw one pipeline schedule
  layout           who holds what on any number of ranks
  submit           submit a recipe to SLURM, and look after it
  prepare-data     raw documents to token shards
  data             look into shards: data trace names the documents of a step
  train-tokenizer  a byte-level BPE tokenizer from raw documents
  evaluate         held-out loss of a run
  generate         continue a text
  import           weights from Hugging Face
  export           weights to Hugging Face
  dashboard        the W&B workspace
  completion       completion of commands, groups and keys for bash: eval "$(dsv3 completion)"

dsv3 COMMAND --help tells all of one. Recipe files of your own are found in ./recipes, such as
./recipes/recipe/mine.yaml (recipe=mine), or in other folders with hydra.searchpath=[file:///FOLDER].
""".strip()


def main(words: Sequence[str]) -> int:
    """Run the command that the first word names; return its exit code."""
    if not words or words[0] in ("--help", "-h"):
        print(HELP)
        return 0 if words else 2
    name, *rest = words
    if name == "completion":
        print(bash_completion())
        return 0
    if name not in COMMANDS:
        raise RecipeError(f"{name} is not a command; {nearest(name, list(COMMANDS))}there are: {', '.join(COMMANDS)}")
    if name == "train":
        return train(rest)
    # A command imports what it needs, some of it torch: the others' help should not wait for that.
    return importlib.import_module(f"launcher.{COMMANDS[name]}").main(rest)


def main_of_dsv3() -> None:
    """Run as the command ``dsv3``."""
    sys.exit(guarded(main))


if __name__ == "__main__":
    main_of_dsv3()
