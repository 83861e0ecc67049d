"""A run directory of somebody else, as commands read it: a right answer or one line."""

import json

import pytest

from dsv3_megatron.planning.time.calibrate import times_from_file
from dsv3_megatron.run.exclusive import owner_of
from dsv3_megatron.run.files import cut_json_lines, iterate_json_lines, last_json_line
from dsv3_megatron.run.lock import run_lock
from launcher import demo
from launcher.command_line.compose import compose
from testing.fuzz.mutate import json_lines, json_text

STEPS = [
    {
        "step": step, "tokens": 4096 * step, "lm_loss": 7.0 / step, "mtp_loss": 7.5, "step_seconds": 2.0,
        "tokens_per_second": 1000.0, "max_violation": 0.5,
    }
    for step in range(1, 6)
]  # fmt: skip
SUMMARY = {
    "step": 5, "tokens": 20480, "seconds": 10.0, "before": {"held_out_loss": 5.0, "bits_per_byte": 3.0},
    "after": {"held_out_loss": 2.0, "bits_per_byte": 1.5}, "stopped_by_signal": False,
}  # fmt: skip


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(("name", "damage"), [("metrics.jsonl", json_lines), ("summary.json", json_text)])
def test_a_demo_of_a_run(fuzz, tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(demo.generate, "main", lambda words: 0)
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    files = {"metrics.jsonl": lines(STEPS), "summary.json": json.dumps(SUMMARY).encode()}
    for other, content in files.items():
        (tmp_path / other).write_bytes(content)

    def read(data):
        (tmp_path / name).write_bytes(data)
        assert demo.main([f"run={tmp_path}"]) == 0

    fuzz(damage, [files[name]], read)


def test_rows_from_the_end_are_those_from_the_begin(fuzz, tmp_path):
    path = tmp_path / "metrics.jsonl"

    def read(data):
        path.write_bytes(data)
        rows = list(iterate_json_lines(path))
        assert repr(last_json_line(path)) == repr(rows[-1] if rows else None)  # two NaN are not the same
        cut_json_lines(path, lambda row: "step" in row)
        kept = list(iterate_json_lines(path))
        assert repr(kept) == repr(rows[: len(kept)]) and (not kept or "step" in kept[-1])

    fuzz(json_lines, [lines(STEPS)], read)


def test_a_lock(fuzz, tmp_path):
    owner = {"host": "elsewhere", "process": 4_000_000, "job": "12", "since": "2026-01-01T00:00:00+00:00"}

    def read(data):
        (tmp_path / "lock").write_bytes(data)
        with run_lock(tmp_path):
            assert owner_of(tmp_path / "lock")["process"] > 0
        assert not (tmp_path / "lock").exists()

    fuzz(json_text, [b"{}", json.dumps(owner | {"host": 1}).encode(), json.dumps(owner | {"job": 1}).encode()], read)


def test_measured_times(fuzz, tmp_path):
    recipe = compose(["recipe=dsv3_tiny", "parallel.pipeline=2"])
    file, times = tmp_path / "times.json", [0.5, 0.25]
    measured = {"forward": times, "input_grad": times, "weight_grad": 0.5, "overlapped": [times, times], "send": 0.1}

    def read(data):
        file.write_bytes(data)
        read = times_from_file(file, recipe)
        assert all(0 < time <= 1e9 for time in (*read.forward, *read.input_grad, *read.weight_grad))

    fuzz(json_text, [json.dumps(measured).encode()], read)
