"""Write docs/recipes.md: every group, file and key of a recipe, from the schema itself.

python launcher/views/reference.py [output=docs/recipes.md]      (make docs; a test keeps the page in step)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field

from dsv3_megatron.recipe import Recipe
from launcher.command_line.arguments import Arguments, takes
from launcher.command_line.console import guarded
from launcher.command_line.output import write_output
from launcher.command_line.recipe_files import GROUPS, RECIPES, options
from launcher.command_line.schema import Key, first_sentence, items_of, keys_of, words_of

_HEAD = """# Recipes: every key

<!-- Written by `python launcher/views/reference.py` (`make docs`); edit the settings that it is made from. -->

```bash
python launcher/pretrain.py recipe=dsv3_tiny optim.learning_rate=1e-3 --cfg job   # what a command line comes to
```

A recipe is one file of `recipes/recipe/`; it picks a file of each group and says what differs. On the command line
`group=file` swaps a whole group and `section.key=value` sets one key. Counts take K, M, B, T (`14.8T`), sizes KiB, MiB,
GiB (`80GiB`). Values that change over a run (`optim.learning_rate`, `optim.global_batch`, ...) are a number or a
list of phases: `{until: 2000 steps, shape: linear, to: 2.2e-4}`.

Files of your own need no checkout: `./recipes/recipe/mine.yaml` is `recipe=mine`, and `./recipes/cluster/ours.yaml` is
`cluster=ours`, in the folder that a command is started from. Other folders: `hydra.searchpath=[file:///FOLDER]`, with a
folder for each group in it. A file of yours must not have the name of a shipped one.

What a recipe holds is written to recipe.yaml, the report and W&B, so it holds no secret. A value may refer to another
key (`${run.name}`) and to variables of the environment that name places and jobs (`${oc.env:SCRATCH}`, HOME, USER,
SLURM_JOB_ID). Keys and tokens stay in the environment, which sbatch hands to the job.
"""
_TABLE = "| key | value | default | meaning |\n|---|---|---|---|"


class ReferenceArguments(Arguments):
    """Keys of the command."""

    output: Path = Field(Path("docs/recipes.md"), description="file to write")


@takes(ReferenceArguments, __doc__)
def main(given: ReferenceArguments) -> int:
    """Write the page; return the exit code."""
    write_output(given.output, reference(), "output")
    print(given.output)
    return 0


def reference() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_groups(), *_sections()]).rstrip() + "\n"


def _groups() -> Iterator[str]:
    yield "## Groups and their files\n"
    for group in GROUPS:
        yield f"### {group}\n\n| file | what it is |\n|---|---|"
        for name in options(group, folders=[]):
            what = _cell(opening_sentence(RECIPES / group / f"{name}.yaml"))
            yield f"| [`{name}`](../recipes/{group}/{name}.yaml) | {what} |"
        yield ""


def opening_sentence(path: Path) -> str:
    """Return the first sentence of the comment that a recipe file begins with; brackets in it stay whole."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# ").rstrip())
    text = re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(lines))  # a word hyphenated at the end of a line
    for end in re.finditer(r"(?<=[a-z0-9)])[.;](?= |$)", text):
        if text.count("(", 0, end.start()) == text.count(")", 0, end.start()):
            return text[: end.start()]
    return text


def _sections() -> Iterator[str]:
    yield "## Keys\n"
    outermost = [key for key in keys_of(Recipe) if "." not in key.name]
    for key in outermost:
        if key.section is not None:
            yield from _section(key.name, key.section, f"{key.name}.")
    yield f"### outside of the sections\n\n{_TABLE}"
    yield from (_row(key) for key in outermost if not key.is_section)
    yield ""
    for model in items_of(Recipe):
        yield from _section(f"each {words_of(model.__name__)} of a list", model, "")


def _section(name: str, model: type[BaseModel], prefix: str) -> Iterator[str]:
    yield f"### {name}\n\n{first_sentence(model)}.\n\n{_TABLE}"
    yield from (_row(key) for key in keys_of(model, prefix))
    yield ""


def _row(key: Key) -> str:
    kind = "section, or null" if key.default == "null" and key.is_section else key.kind or "section"
    default = f"`{key.default}`" if key.default is not None else ""
    return f"| `{key.name}` | {_cell(kind)} | {_cell(default)} | {_cell(key.description)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(guarded(main))
