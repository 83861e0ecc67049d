"""The fuzzer finds what it is there for: each kind of fault is planted and found, with a case that shows it again."""

import itertools
import os
import time

import pytest

from parallel.errors import DataError
from testing.fuzz import runner
from testing.fuzz.mutate import binary, json_lines, json_text, yaml_text
from testing.fuzz.runner import fuzz

SEEDS = [b'{"count": 3, "names": ["a", "b"], "inner": {"x": 1.5}}\n', b'{"count": 4}\n{"count": 5}\n']


def test_damaged_files_that_are_refused_in_one_line_are_no_finding():
    def read(data):
        if data not in SEEDS:
            raise DataError("file.json is damaged; make it again")

    assert fuzz(binary, SEEDS, read, 0.3) > 100


def fault(kind, data):
    if kind == "traceback":
        raise KeyError("count")
    if kind == "memory":
        bytearray(3 << 30)
    if kind == "two lines":
        error = DataError("")
        type(error).__str__ = lambda self: "one\ntwo"  # one_line() would not let them through; in the child alone
        raise error
    if kind == "long":
        while True:
            len(data)
    if kind == "waits":
        time.sleep(60)
    if kind == "death":
        os._exit(7)
    if kind == "native loop":
        sum(itertools.repeat(1, 10**13))  # never back in Python's own loop, where a signal's handler would run


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("traceback", "KeyError"),
        ("memory", "MemoryError"),
        ("two lines", "more than one line"),
        ("long", "TookTooLong: more than"),
        ("waits", "TookTooLong: no end"),
        ("death", "ended with 7"),
        ("native loop", "ended with -9"),
    ],
)
def test_a_planted_fault_is_found(kind, said, monkeypatch):
    monkeypatch.setattr(runner, "CASE_SECONDS", 0.2)
    monkeypatch.setattr(runner, "WAIT_SECONDS", 0.6)
    monkeypatch.setattr(runner, "DEATH_SECONDS", 1.5)

    def read(data):
        if len(data) % 7 == 3 and data not in SEEDS:
            fault(kind, data)

    with pytest.raises(AssertionError) as found:
        fuzz(binary, SEEDS, read, 0.5)
    assert said in str(found.value)
    case = str(found.value).split("DSV3_FUZZ_CASE=")[1].split(": ")[0]
    monkeypatch.setenv("DSV3_FUZZ_CASE", case)
    seen = []
    fuzz(binary, SEEDS, seen.append, 0.0)
    assert len(seen[-1]) % 7 == 3


@pytest.mark.parametrize("damage", [binary, json_text, json_lines, yaml_text])
def test_damage_is_the_same_for_the_same_seed_and_changes_most_files(damage):
    cases = [runner._case(damage, SEEDS, 1, number) for number in range(200)]
    assert cases == [runner._case(damage, SEEDS, 1, number) for number in range(200)]
    assert len(set(cases)) > 100 and sum(case in SEEDS for case in cases) < 30
