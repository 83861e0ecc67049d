"""Quantities as people write them."""

import math

import pytest

from parallel.units import parse_bytes, parse_count, show_bytes, show_count, show_duration


@pytest.mark.parametrize(
    ("text", "count"), [("14.8T", 14_800_000_000_000), ("469B", 469_000_000_000), ("2e3", 2000), (7, 7), ("1.5K", 1500)]
)
def test_counts_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["5X", "", "-1", -1, 1.5, True, "T", math.inf, -math.inf, math.nan, {"a": 1}, [1], None]
)
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError, match="count|whole"):
        parse_count(text)


def test_sizes_are_read_and_shown():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert show_bytes(80 * 2**30) == "80.0 GiB"
    for wrong in ("80GB", math.inf, math.nan, -5, {"a": 1}, [1], None):
        with pytest.raises(ValueError, match="80GiB"):
            parse_bytes(wrong)


@pytest.mark.parametrize(("seconds", "text"), [(5, "5.0s"), (200, "3m 20s"), (7300, "2h 1m"), (187200, "2d 4h")])
def test_durations_are_shown(seconds, text):
    assert show_duration(seconds) == text


def test_counts_are_shown():
    assert show_count(62_914_560) == "62.91M"


@pytest.mark.parametrize("parse", [parse_count, parse_bytes])
@pytest.mark.parametrize("given", [{}, [], None, {"a": 1}, [1], "1" * 50])
def test_what_is_no_text_and_no_number_is_no_quantity(parse, given):
    with pytest.raises(ValueError, match="is not a (count|size)"):
        parse(given)


@pytest.mark.parametrize("number", ["1e400", "2e18", 10**400, 1e19, "9" * 41, "1" * 100_000])
@pytest.mark.parametrize(("parse", "unit"), [(parse_count, "K"), (parse_bytes, "KiB")])
def test_what_is_more_than_anybody_counts_is_refused_and_not_repeated(number, parse, unit):
    with pytest.raises(ValueError, match="is more than 1,000,000,000,000,000,000|is not a") as caught:
        parse(number + unit if isinstance(number, str) else number)
    assert len(str(caught.value)) < 200
