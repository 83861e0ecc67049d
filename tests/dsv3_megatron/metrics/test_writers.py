"""W&B and TensorBoard: everything a step reports arrives, read back with their own readers."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dsv3_megatron.metrics.names import GROUPS, NAMES, grouped
from dsv3_megatron.metrics.row_numbers import RowNumbers
from dsv3_megatron.metrics.step_metrics import JsonLines, StepMetrics
from dsv3_megatron.metrics.wandb_writer import WandbRun, run_id
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.resilient import ResilientFiles
from dsv3_megatron.train.writers import open_writers
from launcher.command_line.compose import compose
from parallel.layout import Layout

KINDS = {"int": 3, "float": 0.5, "int | None": 2, "float | None": 0.25, "list[float] | None": [0.5, 0.75]}
METRICS = StepMetrics(**{field.name: KINDS[field.type] for field in fields(StepMetrics)})
LOADS = np.arange(32.0).reshape(2, 16)
HELD_OUT = {
    "held_out_loss": 1.5, "bits_per_byte": 0.75, "held_out/web": 1.25, "bits_per_byte/web": 0.5, "step": 3,
}  # fmt: skip
EVENTS = {
    "evaluation/held_out_loss": 1.5, "evaluation/bits_per_byte": 0.75, "held_out/web": 1.25, "bits_per_byte/web": 0.5,
    "tasks/quiz/acc": 0.25, "tasks/quiz/acc_norm": 0.5,
}  # fmt: skip
TASK = {"task": "quiz", "examples": 4, "acc": 0.25, "acc_norm": 0.5, "step": 3}


def nothing_is_refused(name, values, text):
    raise AssertionError(text)


FILES = ResilientFiles(nothing_is_refused)


def recipe(directory, *words):
    return compose(["recipe=dsv3_tiny", "parallel.pipeline=2", "run.name=a b", f"run.directory={directory}", *words])


def records(directory):
    """Return what W&B's own reader finds in the newest offline run."""
    newest = max((directory / "wandb").glob("offline-run-*"))
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run([wandb, "leet", "inspect", "--json", newest], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def life(directory, step, *words):
    """One start of a run: a step, loads, an evaluation."""
    writers = open_writers(recipe(directory, *words), Layout(pp=2), step - 1, 0, FILES, print)
    for writer in writers:
        writer.write(replace(METRICS, step=step))
        writer.loads(step, LOADS)
        writer.event("held_out", {**HELD_OUT, "step": step})
        writer.event("task", {**TASK, "step": step})
        writer.close()


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The run directory of a run that was started twice, and what W&B wrote in each life."""
    directory = tmp_path_factory.mktemp("wandb") / "run"
    directory.mkdir()
    (directory / "recipe.yaml").write_text("{}\n")
    life(directory, 3, "logging.report_every_seconds=0", "logging.tensorboard=true")
    first = records(directory)
    life(directory, 4, "logging.report_every_seconds=0", "logging.tensorboard=true")
    return directory, first, records(directory)


def history(records):
    return {k: v for record in records if record["type"] == "history" for k, v in record["history"]["item"].items()}


def test_every_metric_has_a_name_in_a_group():
    missing = {field.name for field in fields(StepMetrics)} - set(NAMES)
    assert not missing
    assert len(set(NAMES.values())) == len(NAMES) == sum(len(keys) for keys in GROUPS.values())


def test_the_offline_file_holds_every_metric(offline):
    found = history(offline[1])
    for name, value in grouped(asdict(METRICS)):
        assert name in found, f"{name} is not among {sorted(found)}"
        assert float(found[name]) == value
    measured = {name: float(found[name]) for name in EVENTS}
    assert measured == EVENTS


def test_tensorboard_holds_what_was_measured_under_the_same_names(offline):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    read = module.EventAccumulator(str(offline[0] / "tensorboard")).Reload()
    for name, value in EVENTS.items():
        assert [(event.step, event.value) for event in read.Scalars(name)] == [(3, value), (4, value)], name


def test_expert_load_is_a_histogram_of_every_layer(offline):
    found = history(offline[1])
    for layer, load in enumerate(LOADS):
        name = f"moe/load/layer_{layer:02d}"
        assert found[f"{name}._type"] == "histogram"
        expected, _ = np.histogram(load / load.mean(), bins=found[f"{name}.bins"])
        assert list(found[f"{name}.values"]) == list(expected) and expected.sum() == load.size


def test_the_config_is_the_resolved_recipe(offline):
    [run] = [r["run"] for r in offline[1] if r["type"] == "run"][:1]
    text = json.dumps(run)
    assert "n_routed_experts" in text and '"schedule"' in text
    assert '"frozen"' in text.replace("\\", "")
    assert run["run_group"] == "dsv3_tiny"


def test_schedule_and_recipe_are_artifacts(offline):
    text = json.dumps([r for r in offline[1] if "artifact" in json.dumps(r)])
    assert "schedule.svg" in text and "recipe.yaml" in text


def test_a_requeued_run_keeps_its_id(offline):
    directory, first, second = offline
    ids = {
        r["run"].get("run_id", r["run"].get("id")) for records in (first, second) for r in records if r["type"] == "run"
    }
    assert ids == {run_id(directory, FILES)}
    assert float(history(second)["train/step"]) == 4


def rows(records):
    return [r["history"]["item"] for r in records if r["type"] == "history"]


def test_steps_done_again_are_rows_of_their_own(tmp_path, capfd):
    """After a rollback (same process) and after a kill (next process), which resumes from an older step."""
    numbers, losses = [], []
    for steps in (((1, 4.0), (2, 3.0), (3, 9.0), (2, 2.5), (3, 2.0)), ((2, 2.25), (3, 1.0))):
        writer = WandbRun(recipe(tmp_path), steps[0][0] - 1, 0, FILES, print)
        for step, loss in steps:
            writer.write(replace(METRICS, step=step, tokens=10 * step, lm_loss=loss))
            writer.loads(step, LOADS)
            writer.event("held_out", {**HELD_OUT, "step": step})
        writer.close()
        found = rows(records(tmp_path))
        numbers += [int(row["_step"]) for row in found]
        losses += [(row["train/step"], row["train/lm_loss"]) for row in found if "train/lm_loss" in row]
        assert all(row["train/tokens"] == 10 * row["train/step"] for row in found)
        assert sum("evaluation/held_out_loss" in row for row in found) == len(steps)
    assert losses == [(1, 4.0), (2, 3.0), (3, 9.0), (2, 2.5), (3, 2.0), (2, 2.25), (3, 1.0)]
    assert all(a < b for a, b in pairwise(numbers)), numbers
    assert "monotonically" not in capfd.readouterr().err


def test_a_held_out_loss_before_the_first_step_lies_where_the_run_goes_on(tmp_path):
    writer = WandbRun(recipe(tmp_path), 7, 70, FILES, print)
    writer.event("held_out", {**HELD_OUT, "step": 7})
    writer.close()
    [row] = rows(records(tmp_path))
    assert (row["train/step"], row["train/tokens"], row["evaluation/held_out_loss"]) == (7, 70, 1.5)


def test_an_unreachable_server_does_not_stop_the_run(tmp_path, monkeypatch):
    import dsv3_megatron.metrics.wandb_writer as module

    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    told = []
    writer = WandbRun(recipe(tmp_path, "logging.wandb=online"), 0, 0, FILES, told.append)
    writer.write(METRICS)
    writer.close()
    assert len(told) == 1 and "kept offline" in told[0] and "\n" not in told[0]
    assert "train/lm_loss" in history(records(tmp_path))


def test_tensorboard_reads_every_metric_back(offline):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = event_accumulator.EventAccumulator(str(offline[0] / "tensorboard"))
    reader.Reload()
    scalars = set(reader.Tags()["scalars"])
    assert {name for name, _ in grouped(asdict(METRICS))} <= scalars
    assert [e.step for e in reader.Scalars("train/lm_loss")] == [3, 4]
    assert "moe/load/layer_01" in reader.Tags()["histograms"]


@pytest.mark.parametrize("found", ["", "../../x", "a b", "x" * 65, "a/b", None])
def test_an_id_that_is_no_name_is_made_again_for_it_names_a_folder(tmp_path, found):
    os.mkfifo(tmp_path / "wandb_id") if found is None else (tmp_path / "wandb_id").write_text(found + "\n")
    made = run_id(tmp_path, FILES)
    assert re.fullmatch("[0-9a-f]{8}", made) and run_id(tmp_path, FILES) == made


@pytest.mark.parametrize("found", ["", "²", "9" * 5000, "-3", "x", None])
def test_row_numbers_that_are_none_begin_at_nothing(tmp_path, found):
    os.mkfifo(tmp_path / "rows") if found is None else (tmp_path / "rows").write_text(found)
    assert [RowNumbers(tmp_path / "rows", FILES).take() for _ in range(2)] == [0, 100]


def test_rows_that_are_no_steps_end_no_run_and_are_dropped_with_those_that_are_done_again(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.write_text('{"step": 1}\n{"step": "2"}\n{"step": null}\nnull\n{}\n\0\n{"step": 4}\n')
    JsonLines(directory, FILES, last_step=3)
    assert directory.metrics.read_text() == '{"step": 1}\n'
