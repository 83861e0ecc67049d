"""The comparison of optimizers is fair: one curve, order and text for both, a best rate at no edge of its sweep;
what was done is not done again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.muon_vs_adamw import at_step, compared, main, passes, with_tables
from benchmarks.optimizer_runs import EVALUATIONS, OPTIMIZERS, Training, Trainings, peak, steps_of, sweep
from benchmarks.optimizer_table import table
from dsv3_megatron.optim.regime import Regime
from launcher.command_line.compose import compose
from parallel.errors import RecipeError, UserError
from testing.pages import ROOT
from testing.training.tiny import SMALL

RECIPES = {"dsv3_tiny": ("recipe=dsv3_tiny",), "dsv3_150m": ("recipe=dsv3_150m", "data.path=shards")}


def composed(trainings, optimizer, rate=0.01, seed=7):
    return compose([*trainings.words_of(Training(optimizer, rate, seed)), "run.directory=runs/x"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_sides_differ_in_their_optimizer_alone(recipe, tmp_path):
    trainings = Trainings(RECIPES[recipe], 1.0, tmp_path)
    adamw, muon = (composed(trainings, name).model_dump() for name in OPTIMIZERS)
    assert (adamw["optim"].pop("name"), muon["optim"].pop("name")) == ("adamw", "muon")
    assert adamw == muon


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_curve_is_the_recipes_with_another_peak(recipe, share, tmp_path):
    own = compose([*RECIPES[recipe], "run.directory=runs/x"])
    mine = composed(Trainings(RECIPES[recipe], share, tmp_path), "adamw", rate=3 * peak(own))
    steps = steps_of(own)
    assert steps_of(mine) == round(steps * share)
    before, after = Regime(own.optim, own.data.sequence_length), Regime(mine.optim, mine.data.sequence_length)
    batch = own.optim.global_batch * own.data.sequence_length
    for at in (0.01, 0.05, 0.3, 0.7, 0.9):
        old = before.curves()["learning_rate"](round(steps * at) * batch)
        new = after.curves()["learning_rate"](round(steps * share * at) * batch)
        assert new == pytest.approx(3 * old, rel=0.15), at  # steps are whole
    assert peak(mine) == pytest.approx(3 * peak(own))
    assert mine.run.evaluate_every_steps == round(steps * share / EVALUATIONS)


@pytest.mark.parametrize("best", [0.001, 0.003, 0.02, 0.05])
def test_a_sweep_is_widened_until_its_best_is_not_at_an_edge(best):
    asked = []

    def loss(rate):
        asked.append(rate)
        return abs(rate - best)

    found = sweep(loss, [0.004, 0.002, 0.008])
    chosen = min(found, key=found.get)
    assert min(found) < chosen < max(found)
    assert list(found) == sorted(found) and len(asked) == len(set(asked)) == len(found)


def test_a_sweep_without_an_end_is_refused():
    with pytest.raises(RecipeError, match="still at an edge"):
        sweep(lambda rate: -rate, [1.0, 2.0, 4.0])


def test_equal_time_reads_the_slower_side_before_its_end():
    course = [[0, 0, 8.0], [50, 500, 6.0], [100, 1000, 5.0]]
    assert at_step(course, 75) == 5.5 and at_step(course, 100) == 5.0 and at_step(course, 50) == 6.0
    run = {"held_out": course, "steps": 100, "held_out_loss": 5.0, "bits_per_byte": None}
    slower = compared({"adamw": [run], "muon": [run]}, step_ratio=1.25)
    assert (slower["equal_time"]["adamw"], slower["equal_time"]["muon"]) == ([5.0], [pytest.approx(5.4)])
    faster = compared({"adamw": [run], "muon": [run]}, step_ratio=0.8)
    assert (faster["equal_time"]["adamw"], faster["equal_time"]["muon"]) == ([pytest.approx(5.4)], [5.0])
    assert slower["equal_tokens"]["mean"] == {"adamw": 5.0, "muon": 5.0} and "bits_per_byte" not in slower


def test_where_a_run_passes_a_loss_lies_between_two_evaluations():
    course = [[0, 0, 8.0], [50, 500, 6.0], [100, 1000, 5.0]]
    assert passes(course, 5.5) == 750 and passes(course, 6.0) == 500 and passes(course, 5.0) == 1000
    assert passes(course, 4.9) is None
    better = {"held_out": course, "steps": 100, "held_out_loss": 5.0, "bits_per_byte": 2.0}
    assert compared({"adamw": [better | {"held_out_loss": 5.5}], "muon": [better]}, 1.0)[
        "tokens_to_adamws_last_loss"
    ] == [750]


def test_words_that_are_no_numbers_are_refused():
    with pytest.raises(RecipeError, match="rates = a: "):
        main(["rates=a", "only=losses"])


def test_a_run_that_was_stopped_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    started = []

    def stopped(command, **options):
        folder = Path(next(word for word in command if word.startswith("run.directory=")).partition("=")[2])
        (folder / "summary.json").write_text('{"step": 3, "stopped_by_signal": true, "after": null}')
        started.append(folder)

    monkeypatch.setattr("benchmarks.optimizer_runs.subprocess", SimpleNamespace(run=stopped, STDOUT=None))
    trainings = Trainings(RECIPES["dsv3_tiny"], 1.0, tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="was stopped before its end"):
            trainings.result(Training("muon", 0.01, 7))
    assert len(started) == 2 and started[0] == started[1]


def test_the_page_has_the_tables_of_the_results():
    """To renew: python -m benchmarks.muon_vs_adamw only=report"""
    page = (ROOT / "docs" / "optimizers.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "muon_vs_adamw.json").read_text())
    assert with_tables(page, results) == page


@pytest.mark.slow
@pytest.mark.full
def test_a_comparison_is_trained_once_measured_and_drawn(tmp_path, monkeypatch, capsys):
    words = [word for word in SMALL if not word.startswith(("logging.wandb", "optim.global_batch"))]
    words += ["optim.global_batch=4", "share=0.04", "rates=0.001,0.004", "seeds=3", "repeats=2", "device=cpu"]
    words += [f"directory={tmp_path}/runs", f"output={tmp_path}/found.json", f"plot={tmp_path}/drawn.svg", "page=none"]
    monkeypatch.setattr("benchmarks.muon_vs_adamw.sweep", lambda loss, rates: {rate: loss(rate) for rate in rates})
    assert main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())["dsv3_tiny"]
    trained = found["losses"]["0.04"]
    assert {name: [r["seed"] for r in runs] for name, runs in trained["seeds"].items()} == {
        "adamw": [3],
        "muon": [3],
    }
    first = {name: runs[0]["held_out"][0] for name, runs in trained["seeds"].items()}
    assert first["adamw"] == first["muon"], "the same weights to begin with"
    share = found["costs"]["by_threads"][0]["update_share"]
    assert 0 < share["adamw"] < 1 and 0 < share["muon"] < 1
    assert (tmp_path / "drawn.svg").read_text().count("</svg>") == 1
    assert table(found) in capsys.readouterr().out

    refused = SimpleNamespace(run=lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr("benchmarks.optimizer_runs.subprocess", refused)
    assert main([*words, "only=losses"]) == 0
