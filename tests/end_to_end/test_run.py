"""Whole runs through the trainer: metrics, resume, other layouts, damage, and being asked to stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_megatron.checkpoint.manifest import newest_valid, read_manifest
from parallel.errors import CheckpointError
from testing.ports import free_port
from testing.signals import catches
from testing.training.tiny import SMALL
from testing.training.whole_runs import FOUR_STEPS, copy_of, steps, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(1, *FOUR_STEPS, f"run.directory={directory}")
    return directory


full = pytest.mark.full

CONTRACT = {
    "step", "tokens", "samples", "excluded_tokens", "loss", "lm_loss", "mtp_loss", "balance_loss", "learning_rate",
    "grad_norm", "global_batch", "step_seconds", "tokens_per_second", "tflops_per_device", "mfu", "bubble_fraction",
    "memory_peak_bytes", "max_violation", "max_violation_running", "layer_violation", "rerouted_choices",
    "dropped_choices", "skipped", "data_seconds", "pipeline_seconds", "update_seconds", "slowest_rank",
    "slowest_ratio", "memory_peak_rank", "max_attention_logit", "clipped_heads",
}  # fmt: skip


def test_a_run_leaves_the_files_of_the_contract(undisturbed):
    lines = steps(undisturbed)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == CONTRACT for line in lines)
    assert lines[-1]["tokens"] == 4 * 8 * 32
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["packages"]["megatron-core"] and environment["world"]["size"] == 1
    assert (undisturbed / "recipe.yaml").exists()
    found = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    assert found == ["latest", "step_00000002", "step_00000004"]
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_the_objective_is_main_plus_weighted_mtp_plus_balance(undisturbed):
    for line in steps(undisturbed):
        expected = line["lm_loss"] + 0.3 * line["mtp_loss"] * 31 / 32 + line["balance_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-6)


def test_load_metrics_tell_every_layer_and_what_persists(undisturbed):
    lines = steps(undisturbed)
    assert lines[0]["max_violation_running"] == pytest.approx(lines[0]["max_violation"])
    for line in lines:
        assert len(line["layer_violation"]) == 4  # three MoE layers and the MTP module's
        assert sum(line["layer_violation"]) / 4 == pytest.approx(line["max_violation"])
        assert line["rerouted_choices"] is line["dropped_choices"] is None


def test_a_resumed_run_is_bit_exact(undisturbed, tmp_path):
    place = copy_of(undisturbed, tmp_path / "resumed", keep_steps=2)
    notes = train(1, *FOUR_STEPS, f"run.directory={place}")
    assert any("resumed from" in note and "step 2" in note for note in notes)
    for mine, theirs in zip(steps(place), steps(undisturbed), strict=True):
        for field in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
            assert mine[field] == theirs[field], (field, mine["step"])
    final = "checkpoints/step_00000004"
    assert read_manifest(place / final) == read_manifest(undisturbed / final)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, ("parallel.tensor=2", "parallel.expert=2"), marks=full),
        pytest.param(4, ("parallel.pipeline=2", "parallel.expert=2"), marks=full),
        (4, ("parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipe", "optim.micro_batch=1")),
        pytest.param(2, ("parallel.pipeline=2", "parallel.schedule=dualpipev"), marks=full),
        pytest.param(2, ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.chunks=2"), marks=full),
        pytest.param(2, ("parallel.pipeline=2", "parallel.schedule=zb1p"), marks=full),
        (2, ("parallel.pipeline=2", "parallel.schedule=auto")),
    ],
)
def test_a_run_resumes_in_another_layout_and_back(undisturbed, tmp_path, world, layout):
    place = copy_of(undisturbed, tmp_path / "moved", keep_steps=2)
    there = train(world, *FOUR_STEPS, *layout, "run.steps=3", f"run.directory={place}")  # step 3 elsewhere
    home = train(1, *FOUR_STEPS, f"run.directory={place}")  # step 4 at home again
    for notes, step in ((there, 2), (home, 3)):
        assert any("resumed from" in note and f"step {step}," in note for note in notes), notes
    for mine, theirs in zip(steps(place), steps(undisturbed), strict=True):
        assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_resumed_dualpipe_run_is_bit_exact(tmp_path):
    layout = ("parallel.pipeline=2", "parallel.schedule=dualpipe")
    train(2, *FOUR_STEPS, *layout, f"run.directory={tmp_path / 'whole'}")
    place = copy_of(tmp_path / "whole", tmp_path / "resumed", keep_steps=2)
    train(2, *FOUR_STEPS, *layout, f"run.directory={place}")
    for mine, theirs in zip(steps(place), steps(tmp_path / "whole"), strict=True):
        for field in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
            assert mine[field] == theirs[field], (field, mine["step"])


def test_a_finished_run_does_nothing_more(undisturbed, tmp_path):
    place = copy_of(undisturbed, tmp_path / "finished", keep_steps=4)
    before = (place / "metrics.jsonl").read_text()
    train(1, *FOUR_STEPS, f"run.directory={place}")
    assert (place / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(undisturbed, tmp_path, damage):
    place = copy_of(undisturbed, tmp_path / damage, keep_steps=4)
    newest = place / "checkpoints" / "step_00000004"
    file = newest / "manifest.json" if damage == "manifest" else max(newest.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[: len(data) // 3] if damage in ("truncate", "manifest") else data)
    path, wrong = newest_valid(place / "checkpoints")
    assert path.name == "step_00000002"
    assert len(wrong) == 1 and file.name in wrong[0]
    with pytest.raises(CheckpointError, match="older checkpoint"):
        read_manifest(newest)


def test_damaged_checkpoints_newer_than_the_run_do_not_push_out_its_own(undisturbed, tmp_path):
    place = copy_of(undisturbed, tmp_path / "later", keep_steps=4)
    for step in (4, 2):
        manifest = place / f"checkpoints/step_{step:08d}/manifest.json"
        manifest.write_text(manifest.read_text().replace('"step": ', '"step": 1'))
    (refused,) = [x for x in train(1, *FOUR_STEPS, f"run.directory={place}") if x.startswith("refused")]
    assert "no other checkpoint is valid" in refused and "remove the damaged ones (2)" in refused
    (place / "checkpoints/step_00000002").rename(place / "elsewhere")
    (place / "checkpoints/step_00000004").rename(place / "checkpoints/step_00000900")
    shutil.copytree(undisturbed / "checkpoints/step_00000002", place / "checkpoints/step_00000002")
    train(1, *FOUR_STEPS, "checkpoint.keep=1", f"run.directory={place}")
    assert newest_valid(place / "checkpoints")[0].name == "step_00000004"


def test_resume_never_and_required_say_what_stands_in_the_way(undisturbed, tmp_path):
    (refused,) = train(1, *FOUR_STEPS, f"run.directory={undisturbed}", "run.resume=never")
    assert "run.resume = never" in refused and "run.name" in refused
    (refused,) = train(1, *FOUR_STEPS, f"run.directory={tmp_path / 'new'}", "run.resume=required")
    assert "run.resume = required" in refused


def test_a_checkpoint_of_another_model_is_refused(undisturbed, tmp_path):
    place = copy_of(undisturbed, tmp_path / "other", keep_steps=4)
    (refused,) = train(1, *FOUR_STEPS, f"run.directory={place}", "model.v_head_dim=8")
    assert "model.v_head_dim = 16, not 8" in refused and "\n" not in refused


def test_a_changed_recipe_is_shown_when_a_run_goes_on(undisturbed, tmp_path):
    place = copy_of(undisturbed, tmp_path / "changed", keep_steps=2)
    notes = train(1, *FOUR_STEPS, f"run.directory={place}", "optim.learning_rate=0.02", "run.seed=7")
    (told,) = [note for note in notes if "recipe changed" in note]
    assert "optim.learning_rate: 0.01 -> 0.02" in told and "run.seed: 1234 -> 7" in told
    assert told.count("->") == 2


def command(world, *overrides):
    """Return a command line as a user types it: one process needs no torchrun."""
    if world == 1:
        return [sys.executable, "launcher/pretrain.py", *SMALL, *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    port = ["--master-port", str(free_port())]
    return [*torchrun, *port, "launcher/pretrain.py", *SMALL, *overrides]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, ("parallel.pipeline=2",)),
        pytest.param(4, ("parallel.pipeline=2", "parallel.expert=2"), marks=full),
    ],
)
def test_torchrun_with_several_ranks_gives_the_losses_of_one(tmp_path, undisturbed, world, layout):
    words = ("logging.wandb=offline", f"run.directory={tmp_path / 'several'}")
    done = subprocess.run(
        command(world, *FOUR_STEPS, *layout, *words), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(steps(tmp_path / "several"), steps(undisturbed), strict=True):
        assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-5)
    assert "step 4/4" in done.stdout and "finished" in done.stdout
    assert list((tmp_path / "several" / "wandb").rglob("*.wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=full)])
def test_ctrl_c_ends_cleanly_with_a_checkpoint(tmp_path, world):
    place = tmp_path / "stopped"
    words = command(world, "run.steps=100000", f"run.directory={place}")
    running = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((place / "metrics.jsonl").exists() and len(steps(place)) >= 2):
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: torchrun and all ranks
    _, stderr = running.communicate(timeout=90)
    path, wrong = newest_valid(place / "checkpoints")
    assert path is not None and not wrong, stderr.decode()[-2000:]
    assert read_manifest(path)["step"] == len(steps(place)) >= 2


WARNED_WHEN_BUILT = """
import os, runpy, signal, sys
import dsv3_megatron.train.run as run
prepare = run.prepare_trainer
run.prepare_trainer = lambda *given: (prepare(*given), os.kill(os.getpid(), signal.SIGUSR1))[0]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc whether a handler is there")
@pytest.mark.parametrize(
    "moment", ["before there were ranks", *(pytest.param(m, marks=full) for m in ("imports", "built"))]
)
def test_a_warning_while_the_run_starts_is_remembered(tmp_path, moment):
    """As under SLURM's batch script: the shell around the agent ignores the warning, and the ranks inherit that."""
    place, file = tmp_path / "warned", tmp_path / "warning"
    if moment == "before there were ranks":
        file.touch()
    script = ["-c", WARNED_WHEN_BUILT] if moment == "built" else []
    words = [sys.executable, *script, "launcher/pretrain.py", *SMALL, "run.steps=100000", f"run.directory={place}"]
    running = subprocess.Popen(
        ["bash", "-c", 'trap "" USR1; exec "$@"', "sh", *words],
        cwd=ROOT, env={**os.environ, "DSV3_WARNED_FILE": str(file)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while moment == "imports" and not catches(running.pid, signal.SIGUSR1):
            assert running.poll() is None, running.communicate()
        if moment == "imports":
            running.send_signal(signal.SIGUSR1)
        stdout, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, stderr.decode()[-2000:]
    assert "asked to stop before the first step" in stdout.decode()
    assert not (place / "finished").exists() and newest_valid(place / "checkpoints")[0] is None
    assert not (place / "metrics.jsonl").exists() or not steps(place)
