"""Completion for bash: commands, then groups with their options and keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dsv3_megatron.recipe import Recipe
from launcher.command_line.recipe_files import GROUPS, options, own_folders
from launcher.command_line.schema import keys_of
from launcher.command_line.typed import COMMANDS

_SCRIPT = """
_dsv3() {{
  local words="{keys}" key=${{COMP_WORDS[COMP_CWORD-1]}} typed=${{COMP_WORDS[COMP_CWORD]}}
  [ "$COMP_CWORD" = 1 ] && words="{commands}"
  # bash takes = for a word of its own: recipe = dsv3_t
  [ "$typed" = = ] && typed= || {{ [ "$key" = = ] && key=${{COMP_WORDS[COMP_CWORD-2]}}; }}
  case $key in
{groups}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$typed"))
  [[ ${{COMPREPLY[0]-}} == *= ]] && compopt -o nospace
}}
complete -F _dsv3 dsv3
""".strip()


def bash_completion() -> str:
    """Return what ``eval`` makes bash complete ``dsv3`` with; files of ./recipes as they are now."""
    keys = [f"{key.name}=" for key in keys_of(Recipe) if not key.is_section]
    folders = own_folders()
    groups = [f'    {group}) words="{_words(group, folders)}" ;;' for group in GROUPS]
    names = [f"{group}=" for group in GROUPS]
    return _SCRIPT.format(
        keys=" ".join(dict.fromkeys([*names, *keys])), commands=" ".join(COMMANDS), groups="\n".join(groups)
    )


def _words(group: str, folders: Sequence[Path]) -> str:
    """Return the files of a group that are plain words: bash runs this text, and what stands in a name of a file."""
    return " ".join(name for name in options(group, folders) if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name))
