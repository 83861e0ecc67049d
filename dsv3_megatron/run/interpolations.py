"""What a recipe may refer to: its own keys, and a few variables of the environment that hold no secret.

A recipe is resolved into recipe.yaml, the report and W&B, which others read. OmegaConf's resolvers would put any
variable of the environment there (``${oc.env:WANDB_API_KEY}``), or run whatever a text spells (``${oc.decode:...}``).
"""

from __future__ import annotations

import re
from typing import Any

VARIABLES = (
    "HOME", "USER", "LOGNAME", "HOSTNAME", "SCRATCH", "WORK", "PROJECT", "TMPDIR", "SLURM_JOB_ID", "SLURM_JOB_NAME",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR",
)  # fmt: skip
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\\$\{")  # meant as it stands, for a shell say
_KEY = re.compile(r"\$\{[\w\s.\[\]\0-]*\}")  # of the recipe; \0 is one inside that has been looked at
_VARIABLE = re.compile(rf"\$\{{\s*oc\.env\s*:\s*(?:{'|'.join(VARIABLES)})\s*(?:,[^${{}}\\\0]*)?\}}")


def check_interpolations(content: Any, key: str = "") -> None:
    """Look through plain values for what they may not refer to. ``key``: where they stand.

    Raises: ValueError: one line that names the first key that does, and what it may.
    """
    if isinstance(content, dict):
        for name, value in content.items():
            check_interpolations(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            check_interpolations(value, f"{key}[{index}]")
    elif isinstance(content, str) and "${" in content and not _is_harmless(content):
        said = " ".join(content.split())[:80]
        raise ValueError(
            f"{key} = {said} would be written to recipe.yaml, report and W&B, where a secret must not be; refer to a "
            f"key (${{run.name}}) or to {', '.join(VARIABLES)} (${{oc.env:HOME}}), or write \\${{ for a shell's own"
        )


def escaped(content: Any) -> Any:
    """Return plain values in which no text refers to anything: OmegaConf reads each as what it is now."""
    if isinstance(content, dict):
        return {name: escaped(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [escaped(value) for value in content]
    if isinstance(content, str) and "${" in content:
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", content)
    return content


def _is_harmless(text: str) -> bool:
    """Return whether a text names keys and known variables alone, however they lie in each other."""
    rest, before = _ESCAPED.sub(r"\1", text), ""
    while rest != before:
        before, rest = rest, _VARIABLE.sub("\0", _KEY.sub("\0", rest))
    return "${" not in rest
