"""The messages that docs/troubleshooting.md explains are those that the code prints, word for word."""

import ast
import re

import pytest

import parallel.errors
from launcher.command_line.recipe_files import RECIPES

ROOT = RECIPES.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)`[^|]*\|", PAGE, re.M)
KINDS = {c.kind for c in vars(parallel.errors).values() if isinstance(c, type)}


def rendered(node):
    """Return a literal of Python as it reads with three dots for what is formatted in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join("..." if isinstance(part, ast.FormattedValue) else rendered(part) for part in node.values)


def spoken():
    """Return every text of the packages, and of the shell scripts, in that form."""
    texts = []
    for package in ("dsv3_megatron", "launcher", "parallel"):
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text())
            texts += [rendered(node) for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))]
    # In shell, a variable or a command is what is formatted in; {name} is the batch script's own template.
    scripts = [file.read_text() for file in ROOT.glob("docker/*.sh")] + [text for text in texts if "\n" in text]
    texts += [re.sub(r"\$\{\{.*?\}\}|\$\([^)]*\)|\$\w+|\{\w+\}", "...", text) for text in scripts]
    return [re.sub(r"\.{3,}", "...", text) for text in texts]  # what is shortened ends in dots of its own


@pytest.fixture(scope="module")
def texts():
    return spoken()


def test_the_page_has_rows():
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS)
def test_the_message_is_the_one_that_is_printed(row, texts):
    kind, colon, rest = row.partition(": ")
    message = rest if colon and kind in KINDS else row
    end = message.removesuffix("...")  # the page may end a message early
    assert any(end in text for text in texts), f"nothing prints: {message}"
