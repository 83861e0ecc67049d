"""Which samples a step has read, as the files of a run tell it: starts, recipes that changed, what was left out."""

import json
import os

import pytest

from dsv3_megatron.data.exclude import read_exclusion
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.tracing.history import History
from parallel.errors import RecipeError
from testing.training.tiny import small_recipe

RECIPE = small_recipe("run.steps=40", "optim.global_batch=4", "data.fim_rate=0.0")  # 32 tokens a sequence


def row(step, samples=None, batch=4):
    return {"step": step, "tokens": 128 * step, "global_batch": batch} | ({"samples": samples} if samples else {})


def written(path, rows, events=()):
    path.mkdir(exist_ok=True)
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return History(RunDirectory(path), RECIPE)


def test_a_steps_samples_are_those_before_where_the_next_begins(tmp_path):
    history = written(tmp_path, [row(1, 4), row(2, 8), row(3, 20), row(4, 24)])  # rolled back once, past eight
    assert [list(history.step(n).numbers) for n in (2, 3, 4)] == [[4, 5, 6, 7], [16, 17, 18, 19], [20, 21, 22, 23]]
    assert not history.step(3).notes
    assert [history.tokens(tokens).step for tokens in (0, 127, 128, 511)] == [1, 1, 2, 4]
    assert (history.sample(17).step, history.sample(17).numbers) == (3, [17])
    over = history.sample(11)
    assert over.step is None and "sample 11 was stepped over" in over.notes[0]
    later = history.step(6)
    assert list(later.numbers) == [28, 29, 30, 31]
    assert later.notes == ("4 steps are done: this is what step 6 will read if none is rolled back",)
    assert history.tokens(640).step == 6 and list(history.tokens(640).numbers) == [28, 29, 30, 31]
    assert history.sample(24).step is None and "ends with step 4" in history.sample(24).notes[0]
    with pytest.raises(RecipeError, match=r"the run ends with step 40, after 5.12K tokens .*; name an earlier step"):
        history.step(41)


def test_a_run_that_has_not_begun_reads_from_the_first_sample(tmp_path):
    assert list(written(tmp_path, []).step(2).numbers) == [4, 5, 6, 7]


def test_metrics_of_an_older_version_say_less_and_that_is_said(tmp_path):
    found = written(tmp_path, [row(1), row(2)]).step(2)
    assert list(found.numbers) == [4, 5, 6, 7]
    assert "does not say which samples were read" in found.notes[0]


def test_a_step_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(RecipeError, match="step = 2 is not in .*metrics.jsonl, but step 3 is"):
        written(tmp_path, [row(1, 4), row(3, 12)]).step(2)


def event(name, **values):
    return {"event": name, "time": "", **values}


def changed(then, now, **more):
    return event("recipe_changed", changes={"data.fim_rate": [then, now], **more})


def test_every_step_has_the_recipe_and_the_exclusion_of_its_own_start(tmp_path):
    leave_out = tmp_path / "leave_out"
    leave_out.write_text('{"samples": [9, 11]}\n')
    exclusion = read_exclusion(leave_out)
    run = tmp_path / "run"
    events = [
        event("started"),  # steps 1 and 2, and a third that is done again
        event("resumed", step=2), changed(0.1, 0.2), event("started"),
        event("excluded", step=2, path="leave_out", sha256=exclusion.sha256),  # step 3, and more that are done again
        event("resumed", step=4), changed(0.2, 0.9), event("started"),  # undone by the next
        event("resumed", step=3), changed(0.2, 0.0, **{"data.of_old": [1, 2]}), event("started"),  # step 4
        event("resumed", step=4), event("damaged"),  # killed before it trained
    ]  # fmt: skip
    history = written(run, [row(1, 4), row(2, 8), row(3, 14), row(4, 18)], events)
    RunDirectory(run).excluded(exclusion.sha256).write_text(exclusion.text)
    found = {step: history.step(step) for step in range(1, 6)}
    assert [found[step].recipe.data.fim_rate for step in found] == [0.1, 0.1, 0.2, 0.0, 0.0]
    assert [bool(found[step].exclusion.samples) for step in found] == [False, False, True, False, False]
    assert list(found[3].numbers) == [8, 11, 12, 13]
    assert found[3].recipe.data.exclude == str(RunDirectory(run).excluded(exclusion.sha256))
    assert found[2].recipe.data.exclude is None


@pytest.mark.parametrize(
    "rows", [{}, {**row(1), "step": "1"}, {**row(1), "samples": 1 << 70}, {**row(1), "global_batch": None},
             {**row(1), "global_batch": 1 << 60}, {**row(1), "tokens": -1}, {**row(1), "samples": "a\nb"}],
)  # fmt: skip
def test_metrics_of_somebody_else_are_one_line(tmp_path, rows):
    with pytest.raises(RecipeError, match=r"metrics\.jsonl cannot be understood \(it is no step: .*; restore the fil"):
        written(tmp_path, [rows]).step(1)


@pytest.mark.parametrize(
    "said", [{}, event(1), event("resumed"), event("resumed", step=-1), event("recipe_changed", changes=[]),
             event("recipe_changed", changes={"a": [1]}), event("started", data="x"), event("started", data={}),
             event("excluded", sha256="../../../x")],
)  # fmt: skip
def test_events_of_somebody_else_are_one_line(tmp_path, said):
    with pytest.raises(RecipeError, match=r"events\.jsonl cannot be understood \(it .*; restore the file$"):
        written(tmp_path, [row(1)], [event("started"), said]).step(1)


@pytest.mark.parametrize("change", [{"data.fim_rate": ["x", 1]}, {"run.name.x": [1, 1], "run": [[], 1]}])
def test_a_recipe_that_none_can_have_been_is_one_line(tmp_path, change):
    events = [event("started"), event("resumed", step=1), event("recipe_changed", changes=change), event("started")]
    with pytest.raises(RecipeError, match=r"events\.jsonl says of a recipe what none can; restore the file$"):
        written(tmp_path, [row(1), row(2)], events).step(1)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_one_line(tmp_path, name):
    written(tmp_path, [row(1)])
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(RecipeError, match=rf"{name} cannot be read \(not a regular file\); restore the file$"):
        History(RunDirectory(tmp_path), RECIPE).step(1)
