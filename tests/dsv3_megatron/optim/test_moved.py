"""A resumed run whose recipe was changed is told what its curves are now and would have been."""

import pytest

from dsv3_megatron.optim.moved import moved_curves
from dsv3_megatron.optim.regime import Regime
from testing.training.tiny import small_recipe
from testing.training.whole_runs import events, steps, train

WARMUP = "optim.learning_rate=[{until: 20 steps, shape: linear, at: 0, to: 4e-3}]"


def regime(*words):
    recipe = small_recipe(*words)
    return Regime(recipe.optim, recipe.data.sequence_length)


def moved(before, after, tokens):
    found = moved_curves(regime(*before), regime(*after), tokens)
    return {curve.key.removeprefix("optim."): curve for curve in found}


def test_nothing_has_moved_where_nothing_has_changed():
    assert moved([WARMUP], [WARMUP], 0) == moved([WARMUP], [WARMUP], 10 * 8 * 32) == {}


def test_a_smaller_batch_ends_a_phase_counted_in_steps_early():
    """Ten of twenty steps of warmup at sixteen sequences, then two."""
    tokens = 10 * 16 * 32
    found = moved([WARMUP, "optim.global_batch=16"], [WARMUP, "optim.global_batch=2"], tokens)
    assert set(found) == {"learning_rate", "global_batch"}
    rate = found["learning_rate"]
    assert (rate.then, rate.now) == (pytest.approx(2e-3), 4e-3)
    assert (rate.end_then, rate.end_now) == (2 * tokens, None)
    assert str(rate) == (
        "optim.learning_rate: 0.004 for the next step, and would have been 0.002; "
        "its phase ends with the run, and would have ended at 10.24K tokens"
    )
    assert (found["global_batch"].then, found["global_batch"].now) == (16, 2)


def test_an_end_that_moves_is_told_where_the_value_is_the_same():
    phases = "optim.bias_speed=[{until: 20 steps, at: 0.001}, {until: 30 steps, at: 0}]"
    found = moved([phases, "optim.global_batch=16"], [phases, "optim.global_batch=8"], 5 * 16 * 32)
    assert set(found) >= {"bias_speed", "global_batch"}
    assert found["bias_speed"].then == found["bias_speed"].now == 0.001
    assert (found["bias_speed"].end_then, found["bias_speed"].end_now) == (20 * 16 * 32, 20 * 8 * 32)
    assert "for the next step" not in str(found["bias_speed"])


@pytest.mark.parametrize("name", ["learning_rate", "mtp_weight", "mtp_depth_decay", "bias_speed", "balance_weight"])
def test_every_curve_is_compared(name):
    found = moved([f"optim.{name}=0.25"], [f"optim.{name}=0.5"], 100)
    assert {key: (curve.then, curve.now) for key, curve in found.items()} == {name: (0.25, 0.5)}


def test_a_longer_sequence_is_more_tokens_a_step():
    assert "learning_rate" in moved([WARMUP], [WARMUP, "data.sequence_length=64"], 10 * 8 * 32)


def test_a_resumed_run_tells_both_values(tmp_path):
    words = (WARMUP, f"run.directory={tmp_path}", "checkpoint.every_steps=2")
    train(1, *words, "run.steps=2", "optim.global_batch=16")
    notes = train(1, *words, "run.steps=3", "optim.global_batch=4")
    (told,) = [note for note in notes if "optim.learning_rate: 0.0016" in note]
    (rate,) = [event for event in events(tmp_path, "curve_moved") if event["key"] == "optim.learning_rate"]
    assert rate["step"] == 2 and rate["now"] == steps(tmp_path)[2]["learning_rate"] == pytest.approx(1.6e-3)
    assert rate["then"] == pytest.approx(4e-4) and rate["end_then"] == 4 * rate["end_now"] == 20 * 16 * 32
    assert told.startswith("warning: optim.learning_rate: 0.0016 for the next step, and would have been 0.0004; ")
    assert not any("optim.learning_rate: " in note for note in train(1, *words, "run.steps=4", "optim.global_batch=4"))
