"""QK-clip's arithmetic: factors of heads, of rows, and of a run of numbers that begins and ends anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.optim.qk_clip import head_factors, key_value_rows, query_rows, scale_run


def test_heads_above_the_threshold_come_down_to_it_and_others_are_left_alone():
    nan, inf = float("nan"), float("inf")
    largest = torch.tensor([50.0, 100.0, 100.00001, 400.0, -3.0, nan, inf, -inf])
    factors = head_factors(largest, 100.0)
    assert factors.tolist() == pytest.approx([1, 1, 100 / 100.00001, 0.25, 1, 1, 1, 1])
    assert (factors == 1).tolist() == [True, True, False, False, True, True, True, True]


def test_a_clipped_head_has_its_logits_times_the_factor():
    """Logits of a query and a key made by the scaled projections, part by part; values are as they were."""
    torch.manual_seed(0)
    heads, nope, rope, value, width = 3, 4, 2, 5, 7
    factors = torch.tensor([0.25, 1.0, 0.49])
    query, key_value = torch.randn(heads * (nope + rope), width), torch.randn(heads * (nope + value), width)
    x, latent, rotary_key = torch.randn(width), torch.randn(width), torch.randn(rope)

    def parts(q, kv):
        q, kv = (q @ x).view(heads, -1), (kv @ latent).view(heads, -1)
        return (q[:, :nope] * kv[:, :nope]).sum(1), (q[:, nope:] * rotary_key).sum(1), kv[:, nope:]

    scaled = query * query_rows(factors, nope, rope)[:, None], key_value * key_value_rows(factors, nope, value)[:, None]
    for before, after in zip(parts(query, key_value)[:2], parts(*scaled)[:2]):
        torch.testing.assert_close(after, before * factors)
    assert parts(*scaled)[2].equal(parts(query, key_value)[2])


@given(rows=st.integers(1, 6), width=st.integers(1, 7), ends=st.tuples(st.integers(0, 42), st.integers(0, 42)))
@settings(deadline=None)
def test_a_run_is_scaled_by_the_factors_of_its_rows_wherever_it_begins_and_ends(rows, width, ends):
    start, end = sorted(min(place, rows * width) for place in ends)
    matrix, factors = torch.randn(rows, width), torch.randn(rows)
    expected = matrix.clone().flatten()
    for place in range(start, end):
        expected[place] = matrix[place // width, place % width] * factors[place // width]
    found = matrix.clone().flatten()
    scale_run(found[start:end], factors, width, start)
    assert found.equal(expected)
