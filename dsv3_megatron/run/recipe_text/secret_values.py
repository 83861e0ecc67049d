"""Secrets that a recipe spells out. It is written to recipe.yaml, report, batch script and W&B, which others read."""

from __future__ import annotations

import re
from typing import Any

from dsv3_megatron.run.recipe_text.leaves import leaves

ENVIRONMENT = "cluster.slurm.environment"
_WORDS = r"API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?"
_NAME = re.compile(rf"(?:^|_)(?:{_WORDS})(?:_|$)", re.IGNORECASE)
# A value that the shell looks up ($(cat FILE), $NAME) is no secret itself.
_ASSIGNED = re.compile(r"(?<![\w$])(?P<name>[A-Za-z_]\w*)=(?=['\"]?[^\s'\"$`;])")
_IS_PLACE = re.compile(r"_(?:FILE|PATH|DIR)$", re.IGNORECASE)  # where a secret lies is none
# Forms that issuers have given theirs, so that they are found where somebody has left them.
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|xox[abprs]-[\w-]{10,}|sk-(?:(?:proj|ant)-[\w-]{20,}|[A-Za-z0-9]{40,})|wandb_v1_\w{20,}|wandb login [0-9a-f]{40}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.)|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_IN_ADDRESS = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s/@:]*:[^\s/@]+@")
_ADVICE = (
    "leave it out: sbatch hands the variables of the submitting shell to the job, and cluster.slurm.setup can read it "
    "from a file (export NAME=$(cat FILE))"
)


def is_secret(name: str) -> bool:
    """Return whether a variable of this name holds a secret: ``WANDB_API_KEY``, ``HF_TOKEN``."""
    return _NAME.search(name) is not None and _IS_PLACE.search(name) is None


def check_secrets(recipe: dict[str, Any]) -> None:
    """Look through a whole recipe's plain values for passwords, keys and tokens.

    Raises: ValueError: one line that names the first key, not its value, and where a secret belongs.
    """
    slurm = recipe.get("cluster", {}).get("slurm", {})
    for name in slurm.get("environment", {}):
        if is_secret(name):
            raise ValueError(f"{ENVIRONMENT}.{name} would be written to recipe.yaml, report and W&B; {_ADVICE}")
    for field in ("setup", "options"):
        for line in slurm.get(field, ()):
            for found in _ASSIGNED.finditer(line):
                if is_secret(found["name"]):
                    raise ValueError(
                        f"cluster.slurm.{field} sets {found['name']}, which would be written to recipe.yaml, report "
                        f"and W&B; {_ADVICE}"
                    )
    for key, value in leaves(recipe):
        if isinstance(value, str) and _IN_ADDRESS.search(value):
            raise ValueError(
                f"{key} holds an address with a password in it, which would be written to recipe.yaml, report and W&B; "
                "write it without, and keep the password where its program looks for it (~/.netrc, a login)"
            )
        if isinstance(value, str) and _KNOWN.search(value):
            raise ValueError(
                f"{key} holds a token or a key, which would be written to recipe.yaml, report and W&B; {_ADVICE}"
            )
