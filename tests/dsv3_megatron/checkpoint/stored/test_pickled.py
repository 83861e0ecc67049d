"""A pickle of a stranger is read as data: what it names is not looked up, and it cannot make more than it is long."""

import os
import pickle
import pickletools
import tracemalloc
from dataclasses import dataclass, field
from enum import Enum

import pytest

from dsv3_megatron.checkpoint.stored.pickled import Global, Record, read_pickle

HERE = __name__


class Kind(Enum):
    ONE = 1


@dataclass
class Thing:
    size: tuple = (2, 300, 70_000, -5, 1 << 40)
    children: list = field(default_factory=list)
    kind: Kind = Kind.ONE


class Runs:
    """What a crafted file would call."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


ALLOWED = {f"{HERE}.Thing", f"{HERE}.Kind"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_records(protocol):
    thing = Thing(children=[Thing(), Thing()])
    found = read_pickle(pickle.dumps({"a": thing, "b": [None, True, False, "x" * 300], "c": thing}, protocol), ALLOWED)
    assert found["b"] == [None, True, False, "x" * 300] and found["a"] is found["c"]
    assert type(found["a"]) is Record and found["a"].name == f"{HERE}.Thing" and found["a"].arguments == ()
    assert found["a"].state["size"] == Thing().size and len(found["a"].state["children"]) == 2
    kind = found["a"].state["children"][1].state["kind"]
    assert (kind.name, kind.arguments) == (f"{HERE}.Kind", (1,)) and kind is found["a"].state["kind"]


def test_many_objects_are_numbered_beyond_a_byte():
    values = [f"name {number}" for number in range(70_000)]
    for protocol in (2, 4):
        assert read_pickle(pickle.dumps([values, values], protocol), ()) == [values, values]


def test_a_class_alone_is_its_name():
    assert read_pickle(pickle.dumps([Thing]), ALLOWED) == [Global(f"{HERE}.Thing")]


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_what_it_names_is_not_called(tmp_path, protocol):
    for hidden in (Runs(os.mkdir, str(tmp_path / "made")), Runs(getattr, Thing(), "size"), Runs(eval, "1")):
        with pytest.raises(ValueError):
            read_pickle(pickle.dumps({"a": hidden}, protocol), ALLOWED)
    assert not (tmp_path / "made").exists()


def test_the_refusal_says_what_it_names():
    with pytest.raises(ValueError, match=r"it names posix\.mkdir"):
        read_pickle(pickle.dumps(Runs(os.mkdir, "x")), ALLOWED)
    with pytest.raises(ValueError, match=r"it names builtins\.getattr"):
        read_pickle(pickle.dumps(Runs(getattr, 1, "real")), ALLOWED)


def bomb(name):
    if name == "a number in the memo":  # of which Python's own unpickler makes a table
        return b"\x80\x02Nr\xff\xff\xff\xff."
    if name == "a length":
        return b"\x80\x04X\xff\xff\xff\xff."
    if name == "containers":
        return b"\x80\x04]" + b"}a" * 2_000_000 + b"."
    if name == "tuples as keys":  # whose hash takes twice as long with every level
        return b"\x80\x04}N" + b"\x94h\x00\x86" * 1 + b"Ns."
    if name == "objects":
        return b"\x80\x04]c" + f"{HERE}\nThing\n".encode() + b"\x940" + b"h\x00)\x81a" * 500_000 + b"."
    return b"\x80\x04" + b"(" * 1000 + b"t" * 1001 + b"."


@pytest.mark.parametrize(
    "name", ["a number in the memo", "a length", "containers", "tuples as keys", "objects", "marks"]
)
def test_it_makes_no_more_than_it_is_long(name):
    data = bomb(name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_pickle(data, ALLOWED)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + 1_000_000
    finally:
        tracemalloc.stop()


def test_a_torn_or_changed_pickle_is_a_value_error():
    data = pickle.dumps({"a": Thing(children=[Thing()])})
    assert pickletools.optimize(data)
    for end in range(len(data)):
        with pytest.raises(ValueError):
            read_pickle(data[:end], ALLOWED)
    for place in range(len(data)):
        for value in (0, 0x52, 0x62, 0x75, 0x93, 0xFF, data[place] ^ 1):
            try:
                read_pickle(data[:place] + bytes([value]) + data[place + 1 :], ALLOWED)
            except ValueError:
                continue
