"""Every phase boundary of DeepSeek-V3's schedule (arXiv 2412.19437 section 4.2), to the token."""

import math

import pytest

from dsv3_megatron.optim.regime import Regime
from dsv3_megatron.optim.settings import OptimSettings
from launcher.command_line.compose import compose
from parallel.errors import RecipeError

T, B = 10**12, 10**9


@pytest.fixture(scope="module")
def regime():
    recipe = compose(["recipe=dsv3_671b"])
    return Regime(recipe.optim, recipe.data.sequence_length)


def test_learning_rate_warms_up_over_2000_steps(regime):
    end = regime.tokens_of_step(2000)
    assert regime.learning_rate(0) == 0.0
    assert regime.learning_rate(end // 2) == pytest.approx(1.1e-4, rel=1e-3)
    assert regime.learning_rate(end) == 2.2e-4
    assert 25.2 * B < end < 28 * B  # 2,000 steps of 3,072 sequences, and more as the batch ramps


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(1 * T, 2.2e-4), (10 * T - 1, 2.2e-4), (10 * T, 2.2e-4), (14_300 * B, 2.2e-5), (14_633 * B - 1, 2.2e-5),
     (14_633 * B, 7.3e-6), (14_800 * B - 1, 7.3e-6), (14_800 * B, 7.3e-6)],
)  # fmt: skip
def test_learning_rate_at_every_boundary(regime, tokens, rate):
    assert regime.learning_rate(tokens) == pytest.approx(rate, rel=1e-9)


def test_learning_rate_falls_as_a_cosine(regime):
    for part in (0.25, 0.5, 0.9):
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * part)) / 2
        assert regime.learning_rate(int(10 * T + part * 4.3 * T)) == pytest.approx(expected, rel=1e-9)


def test_batch_ramps_from_3072_to_15360_over_469_billion_tokens(regime):
    assert regime.global_batch(0) == 3072
    assert regime.global_batch(469 * B // 2) == pytest.approx((3072 + 15360) / 2, abs=256)
    assert regime.global_batch(469 * B - 1) == 15360 - 256
    assert regime.global_batch(469 * B) == regime.global_batch(14 * T) == 15360
    assert all(regime.global_batch(i * B) % 256 == 0 for i in range(0, 500, 7))


@pytest.mark.parametrize(
    ("curve", "tokens", "value"),
    [("bias_speed", 14_300 * B - 1, 0.001), ("bias_speed", 14_300 * B, 0.0), ("mtp_weight", 10 * T - 1, 0.3),
     ("mtp_weight", 10 * T, 0.1), ("mtp_weight", 15 * T, 0.1), ("balance_weight", 5 * T, 0.0001)],
)  # fmt: skip
def test_the_other_curves_at_their_boundaries(regime, curve, tokens, value):
    assert getattr(regime, curve)(tokens) == value


def test_a_number_is_a_curve_that_never_changes():
    regime = Regime(OptimSettings(learning_rate=0.5, global_batch=7), 10)
    assert regime.learning_rate(0) == regime.learning_rate(10**15) == 0.5
    assert regime.global_batch(3) == 7 and regime.tokens_of_step(3) == 210


def test_a_phase_in_steps_follows_the_batch_ramp():
    batch = [{"until": 100, "shape": "linear", "at": 1, "to": 3}, {"until": 1000}]
    regime = Regime(
        OptimSettings(global_batch=batch, learning_rate=[{"until": "3 steps", "at": 1.0}, {"until": 900, "at": 2.0}]),
        20,
    )
    tokens, boundary = 0, None
    for _ in range(3):
        tokens += regime.global_batch(tokens) * 20
    boundary = tokens
    assert regime.learning_rate(boundary - 1) == 1.0 and regime.learning_rate(boundary) == 2.0


def test_a_batch_that_starts_at_nothing_is_refused():
    with pytest.raises(RecipeError, match="cannot start at 0"):
        Regime(OptimSettings(global_batch=[{"until": "1K", "shape": "linear", "to": 8}]), 16)


def test_the_tokens_of_a_far_step_are_known_at_once_and_are_those_of_following_every_step():
    optim = compose(["optim.global_batch=[{until: 8K, at: 1}, {until: 16K, shape: linear, to: 9}]"]).optim
    regime, tokens = Regime(optim, 256), 0
    for step in range(60):
        assert Regime(optim, 256).tokens_of_step(step) == regime.tokens_of_step(step) == tokens
        tokens += regime.global_batch(tokens) * 256
    assert regime.tokens_of_step(10**17) - regime.tokens_of_step(10**17 - 1) == 9 * 256
    fixed = Regime(compose(["optim.global_batch=16"]).optim, 256)
    assert fixed.tokens_of_step(10**17) == 16 * 256 * 10**17
