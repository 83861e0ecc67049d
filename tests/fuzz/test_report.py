"""A report of a run directory in which one file is damaged: always a page, with nothing in it but what is ours."""

import json
import os

import pytest

from dsv3_megatron.report.facts import read_run
from dsv3_megatron.report.page import page
from dsv3_megatron.report.writer import schedule_drawing
from launcher.command_line.compose import compose, resolved_yaml
from testing.fuzz.mutate import binary, json_lines, json_text

TIME = "2026-01-01T00:0{}:00+00:00"
EVENTS = [
    {"event": "started", "time": TIME.format(0), "data": {"path": "x"}},
    {"event": "held_out", "time": TIME.format(1), "step": 2, "held_out_loss": 1.5, "held_out/web": 1.25},
    {"event": "task", "time": TIME.format(2), "step": 3, "task": "quiz", "acc": 0.25},
    {"event": "skipped", "time": TIME.format(3), "step": 2, "reason": "norm"},
]
STEPS = [
    {
        "step": step, "tokens": 4096 * step, "lm_loss": 7.0, "mtp_loss": 7.5, "grad_norm": 1.0, "step_seconds": 2.0,
        "tokens_per_second": 1000.0, "tflops_per_device": 0.5, "mfu": None, "bubble_fraction": 0.2, "skipped": 1,
        "memory_peak_bytes": 2**31, "max_violation": 0.5, "max_violation_running": 0.2, "data_seconds": 0.1,
        "pipeline_seconds": 1.5, "update_seconds": 0.4, "max_attention_logit": [1.0, None], "clipped_heads": 0,
    }
    for step in range(1, 6)
]  # fmt: skip
LOADS = [{"step": 5, "loads": [[1, 2, 3, 4], [4, 3, 2, 1]]}]
ENVIRONMENT = {"world": {"size": 2}, "git_commit": "0123456789abc", "git_changed": False}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def files():
    recipe = compose(["recipe=dsv3_tiny", "parallel.pipeline=2", "optim.qk_clip=100"])
    return {
        "recipe.yaml": resolved_yaml(recipe).encode(),
        "events.jsonl": lines(EVENTS),
        "metrics.jsonl": lines(STEPS),
        "expert_load.jsonl": lines(LOADS),
        "environment.json": json.dumps(ENVIRONMENT).encode(),
        "schedule.svg": schedule_drawing(recipe, 8).encode(),
    }


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("events.jsonl", json_lines),
        ("metrics.jsonl", json_lines),
        ("expert_load.jsonl", json_lines),
        ("environment.json", json_text),
        ("schedule.svg", binary),
    ],
)
def test_a_page_is_made_of_whatever_is_sound(fuzz, tmp_path, files, name, damage):
    for other, content in files.items():
        (tmp_path / other).write_bytes(content)

    def read(data):
        (tmp_path / name).write_bytes(data)
        text = page(read_run(tmp_path))
        assert "not drawn" not in text
        assert (text.count("<script") == 0 and text.count("http-equiv") == 2 and text.isprintable()) or "\n" in text

    fuzz(damage, [files[name]], read)
    os.unlink(tmp_path / name)
