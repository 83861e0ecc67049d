"""The arithmetic of benchmarks/goodput.py, on lives that are made up; the benchmark itself takes an hour."""

import pytest

from benchmarks.goodput import Arguments, compared, drift_of, share_of
from benchmarks.goodput_lives import WARM, Life, Lives, Times, moments, times_of


def beats(start, steps, *, step, slow=0.0, stall=0.0, every=4):
    """Return when steps began: the first ones are ``slow`` seconds too long in all, every so many end with a stall."""
    found = [start]
    for number in range(1, steps):
        found.append(found[-1] + step + (slow / WARM if number <= WARM else 0.0) + (0 if number % every else stall))
    return found


def lives(stall=0.0):
    steps = 4 * 25 + WARM
    first = Life(0.0, True, beats(9.0, steps, step=0.5, stall=stall), 100.0)
    second = Life(100.0, False, beats(103.0, steps, step=0.5, slow=0.6, stall=stall), 170.0)
    second.resumed, second.saved = 96, {100: second.beats[4] + 1.2, 104: second.beats[8] + 1.4, 900: 170.0}
    return [first, second, Life(170.0, killed=171.0), Life(271.0, True, beats(274.6, WARM, step=0.5), 300.0)]


def test_steps_are_timed_without_saves_and_starts_with_their_slow_steps():
    found = times_of(lives(stall=0.2), 0.2, every_steps=4)
    assert found.step_seconds == pytest.approx(0.5, rel=0.01)
    assert found.recovery_seconds == pytest.approx(3.0 + 0.6, rel=0.01)  # of the second life: no other counts
    assert found.save.beside_seconds == pytest.approx(1.3)  # of the two saves that a next step shows the beginning of


def test_shares_are_those_of_the_time_from_kill_to_kill(tmp_path, monkeypatch):
    hurt, times = Lives(tmp_path / "hurt", 4, 1.0, 1), Times(0.5, 0.0, 0.0, 3.6)
    hurt.lives = lives()
    (tmp_path / "hurt" / "checkpoints" / "step_00000300").mkdir(parents=True)
    monkeypatch.setattr(hurt, "times", lambda: times)
    assert hurt.seconds == 200.0  # the hundred seconds between two rounds do not count
    found = compared(Arguments(mean=50), times, hurt)
    assert found["measured_share"] == 300 * 0.5 / 200
    assert found["predicted_share"] == found["predicted_share_at_the_rate_that_came"]
    assert found["predicted_share"] == share_of(times, 1 / 50, 4) == pytest.approx(0.93 - 0.02, abs=0.01)
    assert drift_of(found) is None
    busy = Times(0.55, 0.0, 0.0, 3.6)
    monkeypatch.setattr(hurt, "times", lambda: busy)
    assert "steps of the killed run took 110% of the undisturbed time" in drift_of(
        compared(Arguments(mean=50), times, hurt)
    )


def test_half_a_line_is_no_moment(tmp_path):
    (tmp_path / "beats").write_text("1.5\n2.5\n3.")
    assert moments(tmp_path / "beats") == [1.5, 2.5] and moments(tmp_path / "none") == []
