"""plan.py show=regime: the paper's regime as a user sees it (arXiv 2412.19437 section 4.2)."""

import json
import math
import re

import pytest

from launcher.plan import main

B, T = 10**9, 10**12
CONTRACT = {
    "tokens",
    "learning_rate",
    "global_batch",
    "mtp_weight",
    "bias_speed",
    "balance_weight",
    "sequence_length",
}


def at(tokens, capsys, recipe="dsv3_671b"):
    assert main([f"recipe={recipe}", "show=regime", f"at={tokens}", "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("tokens", "rate", "batch", "mtp", "speed"),
    [
        ("0", 0.0, 3072, 0.3, 0.001),
        ("1T", 2.2e-4, 15360, 0.3, 0.001),
        (10 * T - 1, 2.2e-4, 15360, 0.3, 0.001),
        ("10T", 2.2e-4, 15360, 0.1, 0.001),
        ("12.15T", (2.2e-4 + 2.2e-5) / 2, 15360, 0.1, 0.001),  # half of the cosine
        (14_300 * B - 1, 2.2e-5, 15360, 0.1, 0.001),
        ("14.3T", 2.2e-5, 15360, 0.1, 0.0),
        (14_633 * B - 1, 2.2e-5, 15360, 0.1, 0.0),
        ("14.633T", 7.3e-6, 15360, 0.1, 0.0),
    ],
)
def test_values_in_force_are_the_papers(tokens, rate, batch, mtp, speed, capsys):
    found = at(tokens, capsys)
    assert set(found) == CONTRACT
    assert found["learning_rate"] == pytest.approx(rate, rel=1e-9)
    assert (found["global_batch"], found["mtp_weight"], found["bias_speed"]) == (batch, mtp, speed)
    assert (found["balance_weight"], found["sequence_length"]) == (1e-4, 4096)


def test_every_step_of_the_context_extensions_has_the_same_tokens(capsys):
    for recipe, length in (("dsv3_671b_32k", 32768), ("dsv3_671b_128k", 131072)):
        found = at(0, capsys, recipe)
        assert found["sequence_length"] == length and found["learning_rate"] == 7.3e-6
        assert found["global_batch"] * length == 62_914_560


def test_the_table_names_every_phase_and_the_plot_is_written(tmp_path, capsys):
    svg = tmp_path / "regime.svg"
    assert main(["recipe=dsv3_671b", "show=regime", f"svg={svg}"]) == 0
    table = capsys.readouterr().out
    for edge in ("469B", "10T", "14.3T", "14.633T", "14.8T"):
        assert f" {edge} " in table
    assert svg.read_text().count('<g id="axes') == 5


def test_phases_and_steps_agree(capsys):
    assert main(["recipe=dsv3_671b", "show=regime", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 14_800 * B and len(found["phases"]) == 7
    # 14.331T after the ramp in steps of 62.9M tokens, and the ramp: 469B at a batch that grows linearly in tokens.
    ramp = 469e9 / 4096 * math.log(15360 / 3072) / (15360 - 3072)
    assert found["steps"] == pytest.approx(14.331e12 / (15360 * 4096) + ramp, rel=3e-3)


ANNEALED = [
    "recipe=dsv3_tiny", "data=indexed", "data.path=shards", "run.steps=null", "run.tokens=4M",
    "data.mixture=[{until: 2M, at: {web: 3, code: 1}}, {until: 4M, shape: linear, to: {code: 1, math: 3}}]",
]  # fmt: skip


def test_a_mixture_is_part_of_the_regime(tmp_path, capsys):
    assert main([*ANNEALED, "show=regime", "at=3M", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["mixture"] == {"web": 0.375, "code": 0.25, "math": 0.375}
    assert main([*ANNEALED, "show=regime", "at=3M"]) == 0
    assert "share of math    0.375" in capsys.readouterr().out
    assert main([*ANNEALED, "show=regime", "format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["mixture"]
    web, math = {"web": 0.75, "code": 0.25}, {"code": 0.25, "math": 0.75}
    assert rows == [
        {"tokens": 0, "until": 2_000_000, "at": web, "to": web},
        {"tokens": 2_000_000, "until": 4_000_000, "at": web, "to": math},
    ]
    svg = tmp_path / "regime.svg"
    assert main([*ANNEALED, "show=regime", f"svg={svg}"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^ +2M +489 +0.75 to 0 +0.25 +0 to 0.75$", table, re.M), table
    assert svg.read_text().count('<g id="axes') == 6
