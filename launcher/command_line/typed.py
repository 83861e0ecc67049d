"""How a command of ours is typed in the user's shell: a script of the checkout, or ``dsv3`` where it is installed."""

from __future__ import annotations

import re

from dsv3_megatron.run.shell import program, typed_path
from launcher.command_line.recipe_files import IS_CHECKOUT, ROOT

COMMANDS = {  # dsv3 NAME -> the script of launcher/
    "train": "pretrain",
    "plan": "plan",
    "schedule": "schedule",
    "layout": "layout",
    "submit": "submit",
    "prepare-data": "prepare_data",
    "data": "data",
    "train-tokenizer": "train_tokenizer",
    "evaluate": "evaluate",
    "generate": "generate",
    "import": "import_hf",
    "export": "export_hf",
    "dashboard": "dashboard",
}
_NAMES = {script: name for name, script in COMMANDS.items()}
_SCRIPT = re.compile(r"(?:python |torchrun (--nproc-per-node \w+ ))?(?:launcher/|(?<![\w/.-]))(\w+)\.py\b")


def script(name: str) -> str:
    """Return how a script of the repository (``launcher/plan.py``) is named from the current directory."""
    return typed_path(ROOT / name)


def command(name: str, *, ranks: int | None = None) -> str:
    """Return how ``dsv3 NAME`` is typed here, on so many ranks; what is printed works as pasted."""
    if not IS_CHECKOUT or ranks:
        return f"{program('dsv3')} {name}" + (f" --nproc-per-node {ranks}" if ranks else "")
    return f"{program('python')} {script(f'launcher/{COMMANDS[name]}.py')}"


def as_typed(text: str) -> str:
    """Return a text that names scripts of launcher/ with the names that they have here."""
    return text if IS_CHECKOUT else _SCRIPT.sub(_installed, text)


def _installed(found: re.Match[str]) -> str:
    name = _NAMES.get(found[2])
    return found[0] if name is None else f"dsv3 {name} {found[1] or ''}".rstrip()
