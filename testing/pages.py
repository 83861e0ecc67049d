"""The commands that README, docs and the Dockerfiles tell a reader to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
DOCKER_FILES = sorted(ROOT.glob("docker/Dockerfile*"))  # whose comments hold commands
CODE = re.compile(r"```(?:bash|sh|console)\n(.*?)```", re.S)


def commands(page: Path) -> Iterator[str]:
    """Yield every command of a page or of a Dockerfile's comments; of a container, what it is to run."""
    for line in shell_lines(page):
        line = re.sub(r"^docker run .*? dsv3-megatron:\w+ ", "", line.strip().removeprefix("$ "))
        if re.match(r"(?:[A-Z_]+=\S+ )*(python|torchrun|dsv3 train|make)\b", line):
            yield line


def shell_lines(page: Path) -> Iterator[str]:
    """Yield every line of the page's shell blocks and of its inline code, continuation lines joined."""
    text = page.read_text()
    if page in DOCKER_FILES:
        comments = "\n".join(re.findall(r"^#(.*)", text, re.M)).replace("\\\n", " ")
        blocks, inline = "", re.findall(r"docker (?:run|build) .*", comments)
    else:
        blocks = "\n".join(CODE.findall(text)).replace("\\\n", " ")
        inline = re.findall(r"`((?:python|torchrun|make) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for whole in [*blocks.splitlines(), *inline]:
        yield from whole.split("&&")
