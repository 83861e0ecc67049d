"""Each promise of README has its tests in the fast lane, and each test file that a page names has some there."""

import ast
import re

import pytest
import yaml

from testing.lanes import FAST_LANE
from testing.pages import PAGES, ROOT

PROMISES = yaml.safe_load((ROOT / "tests" / "promises.yaml").read_text())
TABLE = (ROOT / "README.md").read_text().partition("| promise | shown by |\n|---|---|\n")[2].partition("\n\n")[0]
ROWS = [line.removeprefix("| ") for line in TABLE.splitlines()]
NAMED = sorted(
    {name for page in PAGES for name in re.findall(r"\]\((?:\.\./)?(tests/[\w/]*test_\w+\.py)\)", page.read_text())}
)


def names_in(file):
    """Return the names of a file's tests."""
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_has_its_tests():
    assert len(ROWS) > 15
    for row in ROWS:
        assert len([start for start in PROMISES if row.startswith(start)]) == 1, f"tests/promises.yaml: {row}"
    for start in PROMISES:
        assert len([row for row in ROWS if row.startswith(start)]) == 1, f"README.md has no row: {start}"


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_shown_in_the_fast_lane(promise, pytestconfig):
    files, fast = pytestconfig.stash[FAST_LANE]  # of what was collected: in a part of the suite, not every file
    for file, names in PROMISES[promise].items():
        for name in names:
            assert name in names_in(file), f"{file} has no {name}"
            assert file not in files or f"{file}::{name}" in fast, f"make test leaves {file}::{name} out"


@pytest.mark.parametrize("file", NAMED)
def test_a_file_that_a_page_names_has_tests_in_the_fast_lane(file, pytestconfig):
    files, fast = pytestconfig.stash[FAST_LANE]
    assert file not in files or any(name.startswith(f"{file}::") for name in fast)
