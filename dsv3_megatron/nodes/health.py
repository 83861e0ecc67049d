"""What NVIDIA's own tools say of the GPUs of a node, where they are installed.

``nvidia-smi`` is part of the driver. ``dcgmi`` (NVIDIA's Data Center GPU Manager) is asked where it is there: its
shortest diagnosis, ``diag -r 1``, looks at software and takes seconds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any

# Columns of `nvidia-smi --query-gpu` (its --help-query-gpu tells all), and what a value other than these means.
QUERY = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded",
    "remapped_rows.pending": "rows of memory to be remapped at its next reset",
    "remapped_rows.failure": "a row of memory that could not be remapped",
    "clocks_event_reasons.hw_thermal_slowdown": "slowed down by its temperature",
    "clocks_event_reasons.hw_power_brake_slowdown": "slowed down by its power supply",
}
_HARMLESS = {"0", "no", "not active", "n/a", "[n/a]", "[not supported]", ""}
_SECONDS = 40.0  # dcgmi's shortest diagnosis takes about ten


def gpu_problems(wanted: int) -> tuple[list[str], list[str]]:
    """Return (what makes the node unfit, what was not looked at), a line each. ``wanted``: GPUs that it should have."""
    problems, remarks = _of_smi(wanted)
    more, silent = _of_dcgm()
    return problems + more, remarks + silent


def _of_smi(wanted: int) -> tuple[list[str], list[str]]:
    if shutil.which("nvidia-smi") is None:
        return [], ["nvidia-smi is not there: health of GPUs not looked at"]
    answer = _ask("nvidia-smi", f"--query-gpu=index,{','.join(QUERY)}", "--format=csv,noheader,nounits")
    if answer is None:
        return ["nvidia-smi does not answer"], []
    rows = [[word.strip() for word in line.split(",")] for line in answer.splitlines() if line.strip()]
    sound = [row for row in rows if len(row) == 1 + len(QUERY)]
    if len(sound) < len(rows):  # an older driver does not know a column, and says so in words
        return [], [f"nvidia-smi: {answer.splitlines()[0][:100]}: health of GPUs not looked at"]
    problems = list(smi_problems(sound))
    if len(sound) < wanted:
        problems.append(f"has {len(sound)} GPUs, and should have {wanted}")
    return problems, []


def smi_problems(rows: Iterable[list[str]]) -> Iterable[str]:
    """Yield what rows of ``nvidia-smi`` (the index, and a word for each column of ``QUERY``) say is wrong."""
    for index, *words in rows:
        for word, meaning in zip(words, QUERY.values(), strict=True):
            if word.lower() not in _HARMLESS:
                count = f" ({word})" if word.isdecimal() else ""
                yield f"GPU {index}: {meaning}{count}"


def _of_dcgm() -> tuple[list[str], list[str]]:
    if shutil.which("dcgmi") is None:
        return [], ["dcgmi is not there: no diagnosis"]
    answer = _ask("dcgmi", "diag", "-r", "1", "-j", codes=(0, 1, 226))
    try:
        return list(dcgm_problems(json.loads(answer or ""))), []
    except ValueError:
        return [], ["dcgmi gave no answer that can be read: no diagnosis"]


def dcgm_problems(answer: Any) -> Iterable[str]:
    """Yield the tests of a ``dcgmi diag -j`` that have failed: anywhere in its JSON, whose levels differ by version, an
    object with a ``status`` of ``Fail``, named by the nearest ``name`` above it."""

    def failed(value: Any, name: str) -> Iterable[str]:
        if isinstance(value, dict):
            name = str(value.get("name", name))
            if str(value.get("status", "")).lower().startswith("fail"):
                gpu = value.get("gpu_id", value.get("gpu_ids", value.get("entity_id")))
                yield f"dcgmi: {name[:80]} has failed" + (f" (GPU {str(gpu)[:40]})" if gpu is not None else "")
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from failed(inner, name)

    return dict.fromkeys(failed(answer, "a test"))


def _ask(*command: str, codes: tuple[int, ...] = (0,)) -> str | None:
    """Return what a tool prints; None where it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode in codes else None
