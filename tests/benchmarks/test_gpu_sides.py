"""The GPU benchmark as far as a machine without one goes: its sides train, its table and files are made."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fp8_gpu_step, gpu_sides, gpu_table
from dsv3_megatron.planning.time.calibrate import times_from_file
from launcher.command_line.compose import compose

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("recipe=dsv3_tiny", "model.num_nextn_predict_layers=0", "model.num_hidden_layers=2",
         "data.sequence_length=64", "optim.global_batch=4", "optim.micro_batch=2")  # fmt: skip


full = pytest.mark.full


@pytest.fixture(scope="module")
def sides():
    """What the sides find in a process that has Transformer Engine's Python."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "testing.te", "testing/gpu_check/sides_on_cpu.py", *SMALL]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@full
def test_plain_megatron_core_and_transformers_train_the_same_shape(sides):
    assert sides["megatron"]["parameters"] == sides["transformers"]["parameters"]
    for name in ("megatron", "transformers"):
        losses = sides[name]["losses"]
        assert losses[0] == pytest.approx(math.log(2048), rel=0.02)
        assert losses == sorted(losses, reverse=True)


@full
def test_plain_megatron_core_is_over_transformer_engine_in_fp8(sides):
    assert sides["weights"] == ["Float8BlockwiseQTensor"]
    first, *later = sides["quantised"]
    assert first and later == [first, first]  # in every step, as its own schedule has it
    # Grouped experts, norms fused into the linear after them, TE's attention.
    wanted = {"TERowParallelGroupedLinear", "TELayerNormColumnParallelLinear", "TEDotProductAttention", "Fp8Padding"}
    assert wanted <= set(sides["modules"])


@full
def test_stage_times_are_what_calibrate_reads(sides, tmp_path):
    path, found = tmp_path / "times.json", sides["stages"]
    path.write_text(json.dumps(found))
    assert all(seconds > 0 for seconds in found.values())
    assert times_from_file(path, compose(list(SMALL))).forward == (found["forward"],)


def test_the_table_says_which_goals_are_reached():
    def row(rate, mfu=0.3):
        return {"tokens_per_second": rate, "tflops_per_device": 300.0, "mfu": mfu, "memory_peak_bytes": 2**30}

    rows = {"te bf16": row(110), "te fp8": row(121), "megatron bf16": row(100), "te bf16 dense": row(200, 0.5)}
    lines = gpu_table.table(rows, {"megatron fp8, training": "no kernel"})
    assert lines[0].endswith("1.10 x plain megatron-core bf16")
    assert [line.split(": ", 1)[1] for line in lines if line.startswith("goal")] == [
        "te bf16 at least 1.0 x megatron bf16: 1.10, reached",
        "te bf16 dense at least 0.45 MFU: 0.50, reached",
        "te fp8 at least 1.3 x te bf16: 1.10, missed",
    ]
    assert lines[-1] == "failed: megatron fp8, training: no kernel"


def test_a_sides_seconds_become_the_papers_quantities():
    found = gpu_table.in_paper_terms(["recipe=dsv3_one_gpu"], 2.0, 5.0)
    assert found["tokens_per_second"] == 4 * 4096 / 2 and found["mfu"] == found["tflops_per_device"] / 989.5
    unknown = gpu_table.in_paper_terms(["recipe=dsv3_one_gpu", "~cluster.peak_tflops"], 2.0, 5.0)
    assert unknown["mfu"] is None and unknown["tokens_per_second"] == found["tokens_per_second"]


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fp8_gpu_step.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_the_dense_row_has_no_experts():
    words = fp8_gpu_step.words_of(fp8_gpu_step.Arguments(recipe="dsv3_one_gpu"), "te bf16 dense")
    assert compose(words).model.num_moe_layers == 0


def without_work(command, **unused):
    """Stand in for the processes of the benchmark: write what they would, and let megatron-core in FP8 fail."""
    script, given = command[2], dict(word.split("=", 1) for word in command[3:])
    if (given.get("side"), given["precision"]) == ("megatron", "fp8"):
        raise subprocess.CalledProcessError(1, command, stderr="Traceback\nRuntimeError: no kernel\n[W] bye\n")
    if script == "benchmarks.gpu_training":
        place = Path(given["run.directory"])
        place.mkdir()
        line = {"tokens_per_second": 9.0, "tflops_per_device": 1.0, "mfu": 0.5, "memory_peak_bytes": 7}
        (place / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * int(given["run.steps"]))
    if script == "benchmarks.gpu_sides":
        assert gpu_sides.Arguments.model_validate(given)
        stages = {"forward": 1.0, "input_grad": 1.0, "weight_grad": 1.0}
        made = {"stages": stages, "kernels": [[1.5, 3, "gemm"]]}
        side = {"step_seconds": 2.0, "memory_peak_bytes": 7}
        Path(given["output"]).write_text(json.dumps(made.get(given["side"], side)))
    return subprocess.CompletedProcess(command, 0)


@full
def test_our_rows_train_and_leave_no_checkpoint(tmp_path):
    words = [*SMALL, "data=synthetic", "run.steps=1", f"run.directory={tmp_path / 'run'}", "logging.wandb=disabled"]
    command = [sys.executable, "-m", "benchmarks.gpu_training", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_what_is_known_is_written_though_a_row_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "no GPU")
    monkeypatch.setattr("dsv3_megatron.run.directory.environment", lambda world: {})
    monkeypatch.setattr(fp8_gpu_step.subprocess, "run", without_work)
    assert fp8_gpu_step.main(["rounds=2", "recipe=dsv3_one_gpu", f"output={tmp_path / 'found.json'}"]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["rows"]) == set(fp8_gpu_step.ROWS) - {"megatron fp8"}
    assert found["failed"] == {"megatron fp8, training": "RuntimeError: no kernel"}
    assert found["kernels"]["te fp8"] == [[1.5, 3, "gemm"]] and len(found["rounds"]["te fp8"]) == 2
    assert (tmp_path / "gpu_stage_times_torch_fp8.json").exists()
    assert "failed: megatron fp8, training: RuntimeError: no kernel" in capsys.readouterr().out
