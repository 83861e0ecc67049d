"""Saving beside training, refusing disks, what is kept, no flipped byte unnoticed. Real runs, real files."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dsv3_megatron.checkpoint.save as save_module
import dsv3_megatron.train.run as run_module
import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.checkpoint.manifest import newest_valid, read_content, read_manifest
from dsv3_megatron.checkpoint.piece_files import PieceFile
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.pipeline.saved import Entry
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.errors import CheckpointError, UserError
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.lanes import InLanes
from testing.ranks import run_ranks
from testing.small_disk import small_disk
from testing.training.checkpoints import assert_same_tensors
from testing.training.tiny import VALUES, small_recipe, step_batches_of
from testing.training.whole_runs import events

SIX = ("run.steps=6", "checkpoint.every_steps=2", "checkpoint.keep=9", "optim.learning_rate=0.01")


class Notes(SilentReporter):
    """Keeps what the run says."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


class Counter:
    """An extra state: a number for every rank's pipeline position, cut over ranks like any tensor."""

    def __init__(self):
        self.values, self.began = torch.zeros(2), False

    def entries(self):
        return [Entry("counter.values", (2,), (0,), self.values, writes=rank() == 0)]

    def loaded(self):
        self.was_loaded = True

    def begin_anew(self):
        self.began = True


def rank():
    return int(os.environ["RANK"])


def disk_full(directory):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a file cannot grow above: EFBIG, as ENOSPC on a disk


def disk_free(directory):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def write_slowly(directory):
    add = PieceFile.add
    PieceFile.add = lambda file, tensor: time.sleep(0.02) or add(file, tensor)


def ask_to_stop(directory):
    signal.raise_signal(signal.SIGUSR1)


def vanish(directory):
    if rank() == 0:
        os.rename(directory, f"{directory}.away")
        Path(directory).write_text("a file where the folder was")  # refuses root too, as a read-only mount would


def come_back(directory):
    if rank() == 0:
        Path(directory).unlink()
        os.rename(f"{directory}.away", directory)


def run_case(case):
    """Train with things happening after some steps on some ranks; return the notes, or the refusal."""
    torch.set_num_threads(1)
    overrides, happenings = case["overrides"], case.get("after", {})
    recipe, notes, done = small_recipe(*overrides), Notes(), 0
    original, build, add = trainer_module.train_step, run_module.build_parts, PieceFile.add
    built = []

    def step(*arguments):
        nonlocal done
        result = original(*arguments)
        done += 1
        for action, ranks in happenings.get(done, ()):
            if rank() in ranks:
                action(f"{recipe.run.directory}/checkpoints")
        for part in built:
            if "counter" in part.extra_states:
                part.extra_states["counter"].values += 1
        return result

    def with_counter(*arguments):
        built.append(build(*arguments))
        if case.get("counter"):
            built[-1].extra_states["counter"] = Counter()
        return built[-1]

    trainer_module.train_step, run_module.build_parts = step, with_counter
    try:
        run_module.run(recipe, World.from_environment(), notes, resolved_yaml(recipe))
    except UserError as error:
        notes.texts.append(f"refused: {error}")
    finally:
        trainer_module.train_step, run_module.build_parts, PieceFile.add = original, build, add
        save_module.time = time
        disk_free(None)
    counter = built[-1].extra_states.get("counter") if built else None
    return notes.texts, counter and (counter.values.tolist(), counter.began)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two ranks that differ in what happens to them; name -> (directory, rank 0's notes, counter)."""
    place = tmp_path_factory.mktemp("saving")

    def run(some):
        listed = []
        for name, case in some.items():
            directory = place / case.get("in", name).replace(" ", "_")
            words = (*SIX, "parallel.expert=2", *case.get("more", ()), f"run.directory={directory}")
            listed.append({"overrides": words, "after": case.get("after", {}), "counter": case.get("counter", False)})
        for (name, case), result in zip(some.items(), run_ranks(2, run_case, listed)):
            yield place / case.get("in", name).replace(" ", "_"), *result[0]

    return InLanes(CASES, run, "plain", "asynchronous", "disk full", "stopped", "kept", "by time")


def an_hour_passes(directory):
    later = time.monotonic
    others = {"perf_counter": time.perf_counter, "sleep": time.sleep}
    save_module.time = SimpleNamespace(monotonic=lambda: later() + 3600, **others)


BOTH, SECOND = (0, 1), (1,)
CASES = {
    "plain": {},
    "asynchronous": {"more": ("checkpoint.asynchronous=true",)},
    "disk full": {"after": {3: [(disk_full, SECOND)], 5: [(disk_free, SECOND)]}},
    "vanished": {"after": {3: [(vanish, BOTH)], 5: [(come_back, BOTH)]}},
    "full to the end": {"after": {3: [(disk_full, (0,))]}},
    "kept": {"more": ("run.steps=7", "checkpoint.every_steps=1", "checkpoint.keep=2", "checkpoint.keep_every_steps=3")},
    "stopped": {
        "more": ("checkpoint.asynchronous=true", "checkpoint.every_steps=4"),
        "after": {4: [(write_slowly, BOTH)], 5: [(ask_to_stop, (0,))]},
    },
    "by time": {
        "more": ("checkpoint.every_steps=0", "checkpoint.every_minutes=60"),
        "after": {1: [(an_hour_passes, SECOND)], 3: [(an_hour_passes, (0,))]},
    },
    "extra": {"counter": True, "more": ("run.steps=2",)},
    "extra resumed": {"counter": True, "more": ("run.steps=4",), "in": "extra"},
    "extra left out": {"more": ("run.steps=5",), "in": "extra"},
    "extra anew": {"counter": True, "more": ("run.steps=6",), "in": "extra"},
}


def test_an_asynchronous_save_holds_what_a_synchronous_one_holds(runs):
    for step in (2, 4, 6):
        name = f"checkpoints/step_{step:08d}"
        assert_same_tensors(runs["asynchronous"][0] / name, runs["plain"][0] / name)
    told = events(runs["asynchronous"][0], "saved")
    assert [event["step"] for event in told] == [2, 4, 6]
    assert all(0 < event["stall_seconds"] <= event["seconds"] for event in told)


def test_a_save_is_due_when_the_clock_of_rank_0_says_so(runs):
    told = events(runs["by time"][0], "saved")
    assert [event["step"] for event in told] == [3, 6], "the other rank's clock does not count"
    name = "checkpoints/step_00000006"
    assert_same_tensors(runs["by time"][0] / name, runs["plain"][0] / name)


def test_a_full_disk_on_one_rank_fails_the_save_and_not_the_run(runs):
    directory, notes, _ = runs["disk full"]
    (failed,) = events(directory, "save_failed")
    assert failed["step"] == 4 and "File too large" in failed["reason"] and failed["retry_step"] == 5
    assert any("training goes on" in note and "free" in note for note in notes)
    assert [event["step"] for event in events(directory, "saved")] == [2, 5, 6], "tried again after one step"
    assert_same_tensors(directory / "checkpoints/step_00000006", runs["plain"][0] / "checkpoints/step_00000006")
    assert not list((directory / "checkpoints").glob(".*")), "nothing half written is left"


def make_room(directory):
    if rank() == 0:
        subprocess.run(["mount", "-o", "remount,size=64m", Path(directory).parent], check=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of 9 MiB: one checkpoint fits, and half of the next."""
    with small_disk(tmp_path / "disk", "9m") as place:
        yield place


def test_a_disk_without_room_keeps_the_last_good_checkpoint_until_there_is_room(runs, disk):
    words = (*SIX, "parallel.expert=2", "checkpoint.keep=1", f"run.directory={disk}")
    run_ranks(2, run_case, [{"overrides": words, "after": {5: [(make_room, (0,))]}}])
    failed = events(disk, "save_failed")
    assert [event["step"] for event in failed] == [4] and "No space left" in failed[0]["reason"]
    assert [event["step"] for event in events(disk, "saved")] == [2, 5, 6]
    assert_same_tensors(disk / "checkpoints/step_00000006", runs["plain"][0] / "checkpoints/step_00000006")


@pytest.mark.full
def test_a_vanished_or_unwritable_folder_fails_the_save_and_not_the_run(runs):
    directory, _, _ = runs["vanished"]
    assert [event["step"] for event in events(directory, "save_failed")] == [4]
    assert [event["step"] for event in events(directory, "saved")] == [2, 5, 6]
    assert_same_tensors(directory / "checkpoints/step_00000006", runs["plain"][0] / "checkpoints/step_00000006")


@pytest.mark.full
def test_a_disk_that_stays_full_ends_the_run_with_a_refusal_and_the_last_good_checkpoint(runs):
    directory, notes, _ = runs["full to the end"]
    assert "refused: checkpoint:" in notes[-1] and "in 3 tries" in notes[-1] and "step_00000002" in notes[-1]
    path, wrong = newest_valid(directory / "checkpoints")
    assert path.name == "step_00000002" and not wrong


def test_the_newest_and_every_so_many_steps_are_kept(runs):
    names = sorted(path.name for path in (runs["kept"][0] / "checkpoints").glob("*"))
    assert names == ["latest", "step_00000003", "step_00000006", "step_00000007"]


def test_a_run_that_is_asked_to_stop_gives_up_an_older_save_for_that_of_its_last_step(runs):
    directory, notes, _ = runs["stopped"]
    (given_up,) = events(directory, "save_given_up")
    assert (given_up["step"], given_up["for_step"]) == (4, 5)
    assert any("of step 4 is given up for that of step 5" in note for note in notes)
    assert [event["step"] for event in events(directory, "saved")] == [5] and not events(directory, "save_failed")
    assert [path.name for path in (directory / "checkpoints").iterdir() if path.is_dir()] == ["step_00000005"]


@pytest.mark.full
def test_an_extra_state_is_saved_resumed_and_may_come_and_go(runs):
    assert runs["extra"][2] == ([2.0, 2.0], False)
    assert runs["extra resumed"][2] == ([4.0, 4.0], False)
    assert any("also holds counter" in note for note in runs["extra left out"][1])
    values, began = runs["extra anew"][2]
    assert values == [1.0, 1.0] and began
    assert any("holds no counter" in note for note in runs["extra anew"][1])


def test_every_byte_of_every_file_is_watched(runs, tmp_path):
    place = shutil.copytree(runs["plain"][0] / "checkpoints", tmp_path / "flipped")
    newest, choice = place / "step_00000006", random.Random(1)
    names = [*read_content(newest)["files"], "manifest.json"]
    assert {".metadata", "metadata.json", "common.pt", "recipe.yaml", "__0_0.distcp", "__0_1.distcp"} < set(names)
    for name in names:
        file = newest / name
        whole = file.read_bytes()
        for position in {0, len(whole) - 1, *(choice.randrange(len(whole)) for _ in range(4))}:
            data = bytearray(whole)
            data[position] ^= 1 << choice.randrange(8)
            if name == "manifest.json" and json_equal(bytes(data), whole):
                continue  # white space: nothing was said differently
            file.write_bytes(data)
            path, wrong = newest_valid(place)
            assert path.name == "step_00000004", (name, position)
            assert len(wrong) == 1 and str(file) in wrong[0], (name, position)
        file.write_bytes(whole)
    assert newest_valid(place)[0] == newest


def json_equal(mine, theirs):
    try:
        return json.loads(mine) == json.loads(theirs)
    except ValueError:
        return False


def test_the_pointer_is_for_people_and_cannot_mislead(runs, tmp_path):
    place = shutil.copytree(runs["plain"][0] / "checkpoints", tmp_path / "pointer")
    (place / "latest").write_text("step_00000002\n")
    assert newest_valid(place)[0].name == "step_00000006"


def test_a_checkpoint_that_the_user_named_is_started_from_or_refused(runs, tmp_path):
    named = shutil.copytree(runs["plain"][0] / "checkpoints/step_00000004", tmp_path / "named")
    words = [*SIX, "parallel.expert=2", f"checkpoint.load={named}"]
    good = {"overrides": [*words, f"run.directory={tmp_path / 'started'}"]}
    (((notes, _), _),) = run_ranks(2, run_case, [good])
    assert any(f"resumed from {named} (step 4" in note for note in notes)
    assert_same_tensors(tmp_path / "started/checkpoints/step_00000006", runs["plain"][0] / "checkpoints/step_00000006")
    (named / "__1_0.distcp").unlink()
    bad = {"overrides": [*words, f"run.directory={tmp_path / 'refused'}"]}
    (((notes, _), _),) = run_ranks(2, run_case, [bad])
    assert notes[-1].startswith(f"refused: checkpoint: {named}/__1_0.distcp is missing") and "begin anew" in notes[-1]
    with pytest.raises(CheckpointError, match="missing"):
        read_manifest(named)


def tensors_left_by_saves(case):
    """Save beside training three times; return the shapes of tensors that each save has left to the collector."""
    recipe = small_recipe("checkpoint.asynchronous=true", "optim.ema_decay=0.5")
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        saver = Saver(case, recipe.checkpoint, parts, resolved_yaml(recipe), lambda *told: None)
        found = []
        for step in (1, 2, 3):
            train_step(parts, step_batches_of(parts, step), VALUES)
            gc.collect()
            saver.save({"step": step, "tokens": 0, "samples": 0, "skipped": 0})
            saver.finish(step)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            gc.set_debug(0)
            found.append([tuple(x.shape) for x in gc.garbage if isinstance(x, torch.Tensor)])
            gc.garbage.clear()
        return found
    finally:
        stop_processes()


def test_a_save_leaves_no_tensor_to_the_collector(tmp_path):
    assert run_ranks(1, tensors_left_by_saves, [tmp_path]) == [[[[], [], []]]]
