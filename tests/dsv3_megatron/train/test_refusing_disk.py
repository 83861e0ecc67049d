"""Every file that a run writes beside its checkpoints may be refused, at any time, without an end of the training."""

import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dsv3_megatron.metrics.row_numbers as row_numbers
import dsv3_megatron.run.resilient as resilient
import dsv3_megatron.train.journal as journal_module
import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.metrics.step_metrics import StepMetrics
from dsv3_megatron.run.directory import RunDirectory
from dsv3_megatron.run.files import read_json_lines
from dsv3_megatron.train.journal import Journal
from dsv3_megatron.train.progress import Progress
from launcher.command_line.compose import resolved_yaml
from parallel.layout import Layout
from testing.ranks import run_ranks
from testing.small_disk import small_disk
from testing.training.tiny import small_recipe
from testing.training.whole_runs import Notes, events, run_here, steps, train

METRICS = StepMetrics(**{f.name: [0.5] if "list" in f.type else 1 for f in fields(StepMetrics)})
LOADS = np.ones((4, 8))
# What a run writes, and how it is written: a file grows, or is replaced as a whole by way of FILE.tmp.
GROWS = ("metrics.jsonl", "events.jsonl", "expert_load.jsonl", "tensorboard")
REPLACED = (
    "recipe.yaml", "environment.json", "summary.json", "finished", "schedule.svg", "wandb_id", "wandb_rows",
    "report.html",
)  # fmt: skip
REPORT = "logging.report_every_seconds=60"


class FakeWandb:
    """As much of the package as a run uses; ``refuses``: what it says of every row."""

    Artifact = staticmethod(lambda name, type: SimpleNamespace(add_file=lambda path: None))
    Settings = Histogram = staticmethod(lambda **options: None)

    def __init__(self):
        self.refuses, self.rows, self.errors = None, [], SimpleNamespace(Error=RuntimeError)

    def init(self, **options):
        return SimpleNamespace(
            define_metric=lambda *names, **options: None, log=self.log, summary={}, log_artifact=lambda artifact: None,
            finish=lambda: None,
        )  # fmt: skip

    def log(self, values, *, step, commit):
        if self.refuses:
            raise self.refuses
        self.rows.append(step)


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setattr(resilient, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(row_numbers, "_BLOCK", 2)
    monkeypatch.setattr(journal_module, "run_facts", lambda parts: {})
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def journal_of(directory):
    """Return a journal of a run of two pipeline ranks that writes all there is, what it says, and how it opens."""
    words = ("parallel.pipeline=2", "logging.wandb=offline", "logging.tensorboard=true", REPORT)
    recipe, notes = small_recipe(*words, f"run.directory={directory}"), Notes()
    parts = SimpleNamespace(recipe=recipe, layout=Layout(pp=2))
    journal = Journal(RunDirectory(directory), notes, speaks=True)
    return journal, notes.texts, lambda: journal.open(parts, Progress(), resolved_yaml(recipe), finished=False)


def step(journal, number):
    journal.step(replace(METRICS, step=number, tokens=256 * number), 9)
    journal.loads(number, LOADS)
    journal.evaluation(number, {"held_out_loss": 1.0})
    journal.event("skipped", {"step": number}, "skipped")


def end(journal):
    journal.close({"before": {"held_out_loss": 1.0}}, finished=True)


def refuse(place):
    """Let the disk refuse a file from now on; return what lets it take the file again."""
    if place.name in GROWS:
        kept = place.with_name(place.name + ".kept")
        if place.exists():
            place.rename(kept)
        place.symlink_to("/dev/full")

        def take():
            place.unlink()
            if kept.exists():
                kept.rename(place)

        return take
    (place.parent / f"{place.name}.tmp").mkdir()
    return (place.parent / f"{place.name}.tmp").rmdir


def test_the_tables_name_every_file(tmp_path, wandb):
    journal, texts, opens = journal_of(tmp_path)
    opens()
    step(journal, 1)
    end(journal)
    assert {path.name for path in tmp_path.iterdir()} == {*GROWS, *REPLACED} and texts == ["skipped"]


@pytest.mark.parametrize("name", [*GROWS, *REPLACED])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_refused_file_is_told_and_comes_later(tmp_path, wandb, name, begin):
    """From the start of the run or after two steps, up to the fourth of six, or to before the end."""
    journal, texts, opens = journal_of(tmp_path)
    late = name in ("summary.json", "finished", "report.html")  # written at the end alone
    take = refuse(tmp_path / name) if begin == 0 else None
    opens()
    for number in range(1, 7):
        step(journal, number)
        if number == begin:
            take = refuse(tmp_path / name)
        if number == 4 and not late:
            take()
    if late:
        end(journal)
        assert any(name in text and "warning" in text for text in texts)
        take()
        journal.files.flush()
        assert (tmp_path / name).exists() or name == "report.html"
        return
    end(journal)
    once = begin and name in ("recipe.yaml", "environment.json", "schedule.svg", "wandb_id")  # written at the start
    told = [text for text in texts if text != "skipped"]
    assert len(told) == (0 if once else 2), told
    assert all(name in text for text in told)
    assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in read_json_lines(tmp_path / "expert_load.jsonl")] == [1, 2, 3, 4, 5, 6]
    named = [(e["event"], e.get("step")) for e in read_json_lines(tmp_path / "events.jsonl")]
    kept = [e for e in named if e[0] in ("started", "held_out", "skipped")]
    assert kept == [("started", None), *((k, n) for n in range(1, 7) for k in ("held_out", "skipped"))]
    assert [e[0] for e in named if e not in kept] == ([] if once else ["write_failed", "write_recovered"])
    assert wandb.rows == list(range(18)) and int((tmp_path / "wandb_rows").read_text()) >= 18
    assert (tmp_path / "finished").exists() and (tmp_path / "report.html").exists()


def test_what_wandb_fails_of_is_told_once_and_counted(tmp_path, wandb):
    journal, texts, opens = journal_of(tmp_path)
    opens()
    wandb.refuses = BrokenPipeError(32, "Broken pipe")
    for number in (1, 2):
        step(journal, number)
    wandb.refuses = None
    step(journal, 3)
    end(journal)
    told = [text for text in texts if text != "skipped"]
    assert len(told) == 2 and "W&B cannot be written (Broken pipe)" in told[0] and told[1].endswith("6 are lost")
    assert steps(tmp_path)[-1]["step"] == 3


def test_a_start_goes_on_without_wandb_where_the_disk_refuses_its_files(tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", refuse)
    journal, texts, opens = journal_of(tmp_path)
    opens()
    step(journal, 1)
    assert texts[0].startswith("warning: W&B cannot be started (No space left on device)") and len(texts) == 2


def test_a_run_trains_to_its_end_while_every_file_is_refused(tmp_path):
    """A real run, of which the disk takes the checkpoints alone."""
    for name in (*GROWS, *REPLACED):
        refuse(tmp_path / name)
    words = ("parallel.pipeline=2", "run.steps=2", "logging.tensorboard=true", "logging.expert_load_every_steps=1",
             REPORT, f"run.directory={tmp_path}")  # fmt: skip
    notes = train(2, *words)
    for name in {*GROWS, *REPLACED} - {"wandb_id", "wandb_rows"}:
        assert any(name in note and "cannot be written" in note for note in notes), name
    assert any("metrics.jsonl was not written to the end of the run" in note for note in notes)
    assert (tmp_path / "checkpoints/step_00000002/manifest.json").exists()


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MiB."""
    with small_disk(tmp_path / "disk", "24m") as place:
        yield place


def fill(ballast):
    """Take what is left of a disk."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def run_on_a_disk_that_is_full_for_a_while(case):
    """Train; before the 3rd to the 20th step, each time, what room is left is taken; before the 21st it comes back."""
    overrides, ballast = case
    original, done = trainer_module.train_step, 0

    def step(*arguments):
        nonlocal done
        done += 1
        if 3 <= done <= 20:
            fill(Path(ballast))
        if done == 21:
            Path(ballast).unlink()
        return original(*arguments)

    trainer_module.train_step = step
    try:
        return run_here(overrides)
    finally:
        trainer_module.train_step = original


@pytest.mark.full
def test_a_disk_that_is_full_for_a_while_costs_no_line(disk):
    """A real full disk, with W&B and its own process on it."""
    words = ["run.steps=24", "checkpoint.every_steps=1", "checkpoint.keep=1", "logging.wandb=offline",
             "logging.tensorboard=true", "logging.expert_load_every_steps=1", f"run.directory={disk}/run",
             "model.hidden_size=32", REPORT]  # fmt: skip
    notes = run_ranks(1, run_on_a_disk_that_is_full_for_a_while, [(words, str(disk / "ballast"))])[0][0]
    directory = disk / "run"
    assert any("metrics.jsonl cannot be written (No space left on device)" in note for note in notes), notes
    assert [row["step"] for row in steps(directory)] == list(range(1, 25))
    assert [row["step"] for row in read_json_lines(directory / "expert_load.jsonl")] == list(range(1, 25))
    recovered = {Path(event["file"]).name: event["lost"] for event in events(directory, "write_recovered")}
    assert recovered["metrics.jsonl"] == recovered["events.jsonl"] == 0
    assert (directory / "report.html").exists(), notes[-8:]
    assert events(directory, "save_failed") and (directory / "checkpoints/step_00000024/manifest.json").exists()
