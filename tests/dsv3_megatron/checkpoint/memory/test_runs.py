"""Runs that die between two checkpoints on disk resume from memory, and end as one that nothing has disturbed."""

import os
import shutil
from pathlib import Path

import pytest

import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.checkpoint.memory.folder import State
from dsv3_megatron.checkpoint.memory.lives import read_lives
from dsv3_megatron.checkpoint.memory.saver import MemorySaver
from testing.ranks import run_ranks
from testing.training.checkpoints import assert_same_tensors
from testing.training.whole_runs import events, refusal, run_here, steps

WORDS = ("run.steps=7", "checkpoint.every_steps=4", "parallel.expert=2", "optim.learning_rate=0.01")


class Died(RuntimeError):
    """All ranks end here, as a job does of which a node is gone."""


def live_and_die(case):
    """Run on this rank; return its notes. A case that dies does so on all ranks after a step of this number."""
    words, dies_after, lost, *more = case
    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    step, save = trainer_module.Trainer.step, MemorySaver.save
    if lost and rank == 0:
        for folder in Path(lost).glob("dsv3-*/*/node0"):
            shutil.rmtree(folder)

    def dying_step(self):
        step(self)
        if self.progress.step == dies_after:
            raise Died

    def finished_save(self, progress):  # else the last state that is whole depends on how fast threads are
        save(self, progress)
        self.finish()

    trainer_module.Trainer.step = dying_step
    if not more:
        MemorySaver.save = finished_save
    try:
        return run_here(list(words))
    except Died:
        return ["died"]
    finally:
        trainer_module.Trainer.step, MemorySaver.save = step, save
        del os.environ["SLURMD_NODENAME"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the directories of a run in one piece and of one that dies twice, and what was said at its starts."""
    place = tmp_path_factory.mktemp("memory")
    whole, torn = place / "whole", place / "torn"
    memory = ("checkpoint.memory_every_steps=2", f"checkpoint.memory_path={place}")
    cases = [
        ((*WORDS, f"run.directory={whole}"), None, None),
        ((*WORDS, *memory, f"run.directory={torn}"), 3, None),
        ((*WORDS, *memory, f"run.directory={torn}"), 7, place),  # and node 0 was lost
        ((*WORDS, *memory, f"run.directory={torn}"), None, None),
        (
            (*WORDS, *memory, f"run.directory={place / 'beside'}", "checkpoint.memory_every_steps=1"),
            None,
            None,
            "beside",
        ),
        ((*WORDS, *memory, f"run.directory={place / 'other'}"), 3, None),
        ((*WORDS, *memory, f"run.directory={place / 'other'}", "run.resume=never"), None, None),
        ((*WORDS, *memory, f"run.directory={place / 'other'}", "parallel.expert=1"), 1, None),
    ]
    return place, whole, torn, [each[0] for each in run_ranks(2, live_and_die, cases)]


def test_a_run_that_dies_resumes_from_memory_and_ends_as_undisturbed(runs):
    _, whole, torn, said = runs
    assert said[1] == said[2] == ["died"]
    assert_same_tensors(torn / "checkpoints/step_00000007", whole / "checkpoints/step_00000007")
    assert [row["loss"] for row in steps(torn)] == [row["loss"] for row in steps(whole)]
    assert [(event["step"], event["memory"]) for event in events(torn, "resumed")] == [(2, True), (6, True)]


def test_a_state_is_kept_beside_training_and_changes_nothing(runs):
    """When a save is over depends on threads: the next that is due begins after it."""
    place, whole, _, _ = runs
    assert_same_tensors(place / "beside/checkpoints/step_00000007", whole / "checkpoints/step_00000007")
    saved = [event["step"] for event in events(place / "beside", "saved_in_memory")]
    assert saved and saved == sorted(set(saved)) and set(saved) <= set(range(1, 7))


@pytest.fixture
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)


def test_one_node_keeps_states_without_a_copy_and_says_so(tmp_path, one_process):
    words = (f"run.directory={tmp_path / 'run'}", f"checkpoint.memory_path={tmp_path}")
    notes = run_here([*words, "run.steps=3", "checkpoint.memory_every_steps=1"])
    assert any("no copy on another node: all ranks are on one node" in note for note in notes)
    saved = events(tmp_path / "run", "saved_in_memory")
    assert saved and all(event["bytes"] > 0 == event["bytes_sent"] for event in saved)

    # The run goes on without: what a node may still hold is not of what it does from here on.
    was = read_lives(tmp_path / "run/memory.json")
    notes = run_here([*words, "run.steps=4"])
    lives = read_lives(tmp_path / "run/memory.json")
    assert len([note for note in notes if "count no longer" in note]) == 1
    assert lives.run == was.run and not lives.may_load(State(2, was.life))


def test_what_memory_takes_is_told_and_given_back(runs):
    place, _, torn, _ = runs
    saved = events(torn, "saved_in_memory")
    assert [event["step"] for event in saved] == [2, 4, 6]
    for event in saved:
        assert event["bytes"] == event["bytes_sent"] > 0 and 0 < event["stall_seconds"] < event["seconds"]
    runs = [next(iter(owner.parent.glob("step_*")), None) for owner in place.glob("dsv3-*/*/*/owner.json")]
    assert runs == [None, None]  # the run is finished, and the other one's state is of no use any more


def test_another_layout_begins_with_the_disk_and_says_so(runs):
    place, _, _, said = runs
    assert said[5] == said[7] == ["died"]
    assert [(each["step"], each["memory"]) for each in events(place / "other", "resumed")] == []
    (why,) = events(place / "other", "memory_not_used")
    assert why["reason"] == "memory holds step 2 in another layout or of another model: a checkpoint is used"


def test_a_state_in_memory_counts_for_a_run_that_must_not_resume(runs):
    refused = refusal(runs[3][6])
    assert refused.startswith("checkpoint: run.resume = never, but ") and "rank_00000 exists" in refused
