"""How the suite is put together: what its tests import, and which of them a lane runs."""

import ast

import pytest
from hypothesis import settings

from testing.lanes import InLanes, examples, in_lanes, scope_of
from testing.pages import ROOT


@pytest.mark.parametrize("folder", ["tests", "testing", "benchmarks", "launcher", "dsv3_megatron", "parallel"])
def test_no_module_imports_a_test(folder):
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "tests" for name in modules), file


def test_no_benchmark_changes_where_modules_are_found():
    for file in (ROOT / "benchmarks").rglob("*.py"):
        assert "sys.path" not in file.read_text(), f"{file}: benchmarks run as python -m benchmarks.NAME"


def test_a_table_of_cases_is_shared_between_the_lanes():
    few, rest = in_lanes({"a": 1, "b": 2, "c": 3}, "b")
    assert few.values == ({"b": 2},) and not few.marks
    assert rest.values == ({"a": 1, "c": 3},) and [mark.name for mark in rest.marks] == ["full"]
    with pytest.raises(KeyError):
        in_lanes({"a": 1}, "misspelt")


def test_the_fast_lane_takes_a_fifth_of_the_examples_and_ten_at_least():
    before = settings.get_current_profile_name()
    try:
        settings.load_profile("fast")
        assert [examples(count) for count in (300, 40, 8)] == [60, 10, 8]
        settings.load_profile("default")
        assert examples(300) == 300
    finally:
        settings.load_profile(before)


def test_tests_of_a_file_stay_together_unless_they_share_nothing():
    assert scope_of("tests/a/test_b.py::test_c[d]") == "tests/a/test_b.py"
    apart = "tests/end_to_end/test_chaos.py::test_c[d]"
    assert scope_of(apart) == apart


def test_cases_are_run_a_lane_at_a_time_and_once():
    ran = []

    def run(cases):
        ran.append(list(cases))
        return [case * 10 for case in cases.values()]

    found = InLanes({"a": 1, "b": 2, "c": 3}, run, "a", "c")
    assert (found["c"], found["a"]) == (30, 10) and ran == [["a", "c"]]
    assert found["b"] == 20 and ran == [["a", "c"], ["b"]]


@pytest.mark.parametrize("lane", ["fast", "default"])
def test_no_example_fails_because_the_machine_is_busy(lane):
    assert settings.get_profile(lane).deadline is None
