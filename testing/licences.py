"""Writes docs/licences.md: the licence of every installed package, as the package itself states it (`make locks`)."""

from __future__ import annotations

import re
from importlib import metadata

from testing.locks import ROOT, lock

PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of what is installed

This project is under the Apache License 2.0 ([LICENSE](../LICENSE)). It contains no other project's code; what it needs
is installed beside it, from `locks/`, each under the licence that the package states of itself:

"""
GROUPS = {
    "runtime": "needed to run; in both images",
    "torch": "needed to run; in both images",
    "dev": "tests and lint alone; in no image",
}
# What says nothing in a field, but has the text of its licence in its files.
BY_TEXT = {"torch": "BSD-3-Clause", "tiktoken": "MIT", "antlr4-python3-runtime": "BSD-3-Clause"}


def main() -> None:
    """Write the page, from the packages of this environment."""
    rows = ["| package | licence | |", "|---|---|---|"]
    for name, what in GROUPS.items():
        for package in sorted(lock(name)):
            if (found := licence(package)) is not None:
                rows.append(f"| {package} | {found} | {what} |")
    gpu = ", ".join(sorted({*lock("cuda"), *lock("gpu"), *lock("gpu_bindings")}))
    tail = (
        f"\n\nOn GPUs also: {gpu}. Those named `nvidia-` and `cuda-` are under NVIDIA's own terms, which the packages "
        "hold; Transformer Engine is under the Apache License 2.0, Apex under BSD-3-Clause, DeepEP under MIT.\n"
    )
    PAGE.write_text(HEAD + "\n".join(rows) + tail)


def licence(package: str) -> str | None:
    """Return the licence that a package states, shortly; None where it is not for this system."""
    try:
        facts = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return None
    stated = facts.get("License-Expression") or facts.get("License") or ""
    classes = [
        line.rpartition(" :: ")[2] for line in facts.get_all("Classifier") or () if line.startswith("License ::")
    ]
    if not stated or len(stated) > 60 or "\n" in stated:
        stated = ", ".join(name for name in classes if name != "OSI Approved") or BY_TEXT.get(package, "")
    return re.sub(r"\s+", " ", stated).strip() or "see its files"


if __name__ == "__main__":
    main()
