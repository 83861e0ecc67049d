"""JSON values that lie next to each other in any manner: one that is bad costs itself, and no neighbour."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.raw.json_rows import Unreadable, ValueStream, line_values

# What looks like the end of an object inside a string, and objects inside objects.
ROWS = [
    {"text": f'"}}{{" }},{{ \\ é {n}', "meta": {"a": "}{", "b": [{"text": "inner"}, {"c": "}, {"}], "d": []}}
    for n in range(12)
]
TEXTS = [json.dumps(row, ensure_ascii=False) for row in ROWS]
BAD = {
    "a bare word": '{"text": nope}',
    "before nested objects": '{"text": nope, "meta": "}{", "more": [{"text": "x"}, {"text": "y"}]}',
    "no colon": '{"text" "x", "meta": {"text": "y"}}',
    "single quotes": "{'text': 'x'}",
    "a comma too many": '{"text": "x",, "meta": {}}',
    "words": "some words",
    "words and numbers": "2024-01-01T00:00 INFO",
    "too deep": '{"text":' + "[" * 50_000 + "]" * 50_000 + "}",
    "not closed": '{"text": "x", "meta": {"a": 1}',
    "a closing bracket too many": "}",
    "half a string": '{"text": "x',
}
BETWEEN = {"nothing": "", "a blank": " ", "a comma": ",", "comma, blank": ", ", "comma, line": ",\n", "line": "\n"}


def through_stream(text, size):
    stream, found = ValueStream(), []
    for start in range(0, len(text), size):
        found += stream.feed(text[start : start + size])
    found += stream.feed("", final=True)
    return [value for value, _ in found]


READERS = {
    "line": lambda text: list(line_values(text)),
    "stream": lambda text: through_stream(text, len(text)),
    "pieces": lambda text: through_stream(text, 97),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("between", BETWEEN)
def test_values_are_read_whatever_lies_between(reader, between):
    assert READERS[reader](BETWEEN[between].join(TEXTS)) == ROWS
    assert READERS[reader](BETWEEN[between].join(TEXTS) + ",\n") == ROWS, "a comma after the last is no value"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_value_costs_one_value(reader, between, bad):
    found = READERS[reader](BETWEEN[between].join([*TEXTS[:5], BAD[bad], *TEXTS[5:]]))
    if bad == "half a string" and "line" not in between:  # its string ends where the next begins, whose end is not sure
        assert [value for value in found if isinstance(value, dict)] == [*ROWS[:5], *ROWS[6:]]
        return
    assert [value for value in found if not isinstance(value, Unreadable)] == ROWS
    (lost,) = (value for value in found if isinstance(value, Unreadable))
    assert abs(lost.size - len(BAD[bad])) <= len(BETWEEN[between]), "and its size is said"


@pytest.mark.parametrize("reader", ["stream", "pieces"])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_value_among_printed_ones_costs_one_value(reader, bad):
    texts = [json.dumps(row, indent=2) for row in ROWS]
    for text in ("\n".join([*texts[:5], BAD[bad], *texts[5:]]), f"[{','.join([*texts[:5], BAD[bad], *texts[5:]])}]"):
        found = READERS[reader](text)
        good = [value for value in found if isinstance(value, dict)]
        assert good == ROWS or (bad == "half a string" and "\n".join(texts[:2]) not in text), bad
        assert len(found) <= len(ROWS) + 1


def test_a_bad_value_in_lines_of_its_own_costs_one_value():
    broken = json.dumps(ROWS[0], indent=2).replace('"text":', '"text"')
    texts = [json.dumps(row, indent=2) for row in ROWS]
    for reader in ("stream", "pieces"):
        found = READERS[reader]("\n".join([*texts[:5], broken, *texts[5:]]))
        assert [isinstance(value, Unreadable) for value in found] == [n == 5 for n in range(len(ROWS) + 1)]


def test_what_is_lost_is_counted_in_bytes():
    (lost,) = line_values('{"text": ünlösbar}')
    assert lost.size == len('{"text": ünlösbar}'.encode())


def test_a_number_of_any_length_costs_no_row():
    row = '{"id": ' + "7" * 10_000 + ', "text": "whole"}'
    for found in (list(line_values(row)), list(line_values(row + row)), through_stream(row + row, 500)):
        assert [value["text"] for value in found] == ["whole"] * len(found)


def test_arrays_in_arrays_are_one_row_of_values():
    assert through_stream(f"[[{TEXTS[0]}, {TEXTS[1]}], [{TEXTS[2]}]] [{TEXTS[3]}]", 50) == ROWS[:4]


def test_an_array_that_is_cut_is_one_loss():
    for cut, good in ((f"[{TEXTS[0]}, {TEXTS[1]}", 2), (f"[{TEXTS[0]}, {TEXTS[1]}"[:-9], 1)):
        found = through_stream(cut, 50)
        assert found[:good] == ROWS[:good] and [type(value) for value in found[good:]] == [Unreadable]


def test_a_row_that_never_ends_is_not_waited_for_without_end():
    """A quote that is missing turns strings inside out up to the end of the file, which may be terabytes away."""
    row = json.dumps({"text": "some words " * 40})
    stream, good, held = ValueStream(), 0, 0
    for text in ('{"text": "not closed }', *[row * 100] * 300):
        good += sum(isinstance(value, dict) for value, _ in stream.feed(text))
        held = max(held, len(stream.rest()))
    good += sum(isinstance(value, dict) for value, _ in stream.feed("", final=True))
    assert good >= 100 * 300 - 1 and held < 9 << 20


@given(st.text(alphabet='{}[]",:\\ \nab1', max_size=60), st.integers(1, 7))
def test_any_text_is_used_up_piece_by_piece(text, size):
    for found in (list(line_values(text.replace("\n", ""))), through_stream(text, size)):
        assert all(not isinstance(value, Unreadable) or value.why for value in found)
