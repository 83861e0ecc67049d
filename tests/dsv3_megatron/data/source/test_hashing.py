"""The hash that orders documents: pinned to its publication, because a run's order hangs on it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.data.source.hashing import hashed, key_of, uniform


def test_the_hash_is_splitmix64():
    """Outputs of the reference implementation (Vigna, splitmix64.c) for the seeds 0 and 1234567."""
    assert [hex(x) for x in hashed(0, np.arange(3))] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]  # fmt: skip
    assert hashed(1234567, np.arange(5)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_keys_are_pinned_and_their_parts_are_kept_apart():
    assert key_of("fim", 1) == 0x97BAC1F1B70F97DC
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("abc", "")}) == 4


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63))
def test_a_number_is_hashed_the_same_alone_and_among_others(key, start):
    together = hashed(key, np.arange(start, start + 5, dtype=np.uint64))
    assert together.tolist() == [int(hashed(key, np.uint64(start + n))) for n in range(5)]
    assert together.dtype == np.uint64 and len(set(together.tolist())) == 5


def test_uniform_numbers_fill_the_interval_evenly():
    drawn = uniform(7, np.arange(100_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    share = np.histogram(drawn, 20, (0, 1))[0] / len(drawn)
    assert abs(share - 0.05).max() < 0.004
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.02
