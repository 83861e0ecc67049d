"""The checks of a GPU machine, rehearsed on a CPU: as they are they pass, and each finds the fault it is there for."""

import json

import pytest

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import hang, measured, requantise, resume
from benchmarks.gpu_check.outcome import Visit
from benchmarks.gpu_check.registry import CHECKS
from benchmarks.gpu_check.sizing import plan_of
from launcher.command_line.compose import compose
from testing.gpu_check.faults import of_product
from testing.lanes import in_lanes

# One schedule over two ranks is enough here: tests/parallel has them all.
EVERY = {check.name: check for check in CHECKS if not check.name.startswith("schedule")}
EVERY["schedule dualpipev"] = next(check for check in CHECKS if check.name == "schedule dualpipev")
FEW = ("machine", "cpu losses", "losses te fp8", "fp8 products torch fp8", "resume te fp8", "watchdog")
REHEARSED = in_lanes(EVERY, *FEW, "one expert of two ranks", "host te", "speed megatron bf16")
KERNELS = ("quantise", "swiglu", "weight gradient")
FAULTS = {
    "loss_is_off": "apart, then 1.",
    "weights_stay": "by a new model with its weights",
    "load_is_not_exact": "weights, moments or biases were loaded other than they were saved",
    "other_data_after_a_resume": "state is loaded as saved, but training does not go on as it would have",
    "average_stands_still": "from one made by hand",
    "products_are_off": "beside the emulation at most 2.9e-02 apart",
    "watchdog_is_silent": "and the watchdog of 1 s said nothing",
    "a_rank_fails": "RuntimeError: rank 1: RuntimeError: no such kernel",
}


def visit(checks, folder, found=None):
    """Carry out checks in a rehearsal; return exit code, file and rows."""
    arguments = command.Arguments(output=folder / "found.json", device="cpu", seconds=3000, gpus=2)
    here = command.visit_of(arguments, folder)
    code = command.carry_out(checks, Visit(**(vars(here) | {"found": found or {}})), arguments, ["device=cpu"])
    found = json.loads((folder / "found.json").read_text())
    return code, found, found["rows"]


@pytest.fixture(scope="module")
def cpu_losses(tmp_path_factory):
    """What the other checks compare with."""
    _, _, rows = visit([EVERY["cpu losses"]], tmp_path_factory.mktemp("losses"))
    return {"cpu losses": rows["cpu losses"]["facts"]}


@pytest.fixture(scope="module", params=REHEARSED)
def rehearsal(request, cpu_losses, tmp_path_factory):
    """Checks as they are."""
    return request.param, *visit(request.param.values(), tmp_path_factory.mktemp("rehearsal"), cpu_losses)


@pytest.fixture(scope="module", params=in_lanes(FAULTS, "loss_is_off", "watchdog_is_silent", "a_rank_fails"))
def broken(request, cpu_losses, tmp_path_factory):
    """The checks of a broken product."""
    needs = {"products_are_off": ("te",)}
    checks = [of_product(name, needs.get(name, ())) for name in request.param]
    code, _, rows = visit(checks, tmp_path_factory.mktemp("broken"), cpu_losses)
    return request.param, code, rows


@pytest.mark.slow
def test_every_check_that_a_cpu_can_make_passes(rehearsal):
    checks, code, _, rows = rehearsal
    failed = {name: row["said"] for name, row in rows.items() if row["status"] == "FAIL"}
    assert failed == {}
    assert code == 0 and set(rows) == {name for check in checks.values() for name in check.fills}


@pytest.mark.slow
def test_what_needs_a_gpu_is_skipped_and_no_figure_is_given_for_it(rehearsal):
    _, _, found, rows = rehearsal
    skipped = {name for name, row in rows.items() if row["status"] == "SKIPPED"}
    assert skipped == rows.keys() & {
        "plan", "fp8 products torch fp8", "newton-schulz", "attention", "host te", "host torch",
        "speed megatron bf16", "speed megatron fp8", *(f"kernel {name}" for name in KERNELS),
        *(f"{what} {row}" for what in ("memory", "speed", "kernels") for row in ("te bf16", "te fp8", "torch bf16")),
    }  # fmt: skip
    assert all(rows[name]["facts"] == {} for name in skipped)
    assert found["device"] == "cpu (stand-in)"


@pytest.mark.slow
def test_the_table_says_that_it_was_a_rehearsal(tmp_path, capsys):
    assert command.main(["device=cpu", "only=machine", f"output={tmp_path / 'found.json'}"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == "REHEARSAL ON A CPU: stand-ins play the GPU, and nothing below was measured on one"
    assert lines[1].startswith("PASS    machine") and lines[2] == "1 PASS, 0 FAIL, 0 SKIPPED"


@pytest.mark.slow
def test_each_check_finds_its_fault(broken):
    faults, code, rows = broken
    for fault, told in faults.items():
        assert rows[fault]["status"] == "FAIL" and told in rows[fault]["said"], rows[fault]["said"]
    assert code == 1


# -- verdicts on what only a GPU can show ------------------------------------------------------------------------------


def test_memory_beside_the_plan_fails_where_the_plan_is_wrong():
    words = ("recipe=dsv3_one_gpu", "backend=te")
    rank = plan_of(compose(list(words))).tightest
    planned = rank.total_bytes - rank.reserved_bytes - rank.fragmentation_bytes
    told = {
        share: measured.memory_beside_plan(words, None, round(share * planned), planned) for share in (0.8, 0.98, 1.1)
    }
    assert {share: outcome.status for share, outcome in told.items()} == {0.8: "FAIL", 0.98: "PASS", 1.1: "FAIL"}
    assert "1.100 of it (allowed 0.85 to 1.05)" in told[1.1].said
    exact = measured.memory_beside_plan(words, {"planned": 1000, "allowed": 1030}, 1000, 1000)
    assert exact.status == "PASS" and exact.facts["share"] == 1.0


def test_speed_is_told_beside_megatron_cores_where_that_is_known():
    found = {"tokens_per_second": 110.0, "tflops_per_device": 400.0, "mfu": 0.404, "memory_peak_bytes": 1}
    said = measured.speed(found, {"tokens_per_second": 100.0}).said
    assert said == "110 tokens/s, 400 TFLOP/s, 40.4% MFU, 1.10 x plain megatron-core"
    assert measured.speed(found | {"mfu": None}, None).said == "110 tokens/s, 400 TFLOP/s"


def test_a_hang_must_be_told_with_its_action_and_microbatch():
    told = "hang: no action ended\n  rank 0: the end of the step: gradients, optimizer, metrics, for 1 s"
    assert hang.verdict([told], 4.0).said.startswith("the report does not name the action")


def test_requantisation_fails_where_old_weights_would_not_show():
    assert requantise.verdict(5.0, 5.0, 5.0005).said.endswith("too near to tell")


def test_resume_is_judged_by_state_where_kernels_differ_from_run_to_run():
    states = {"first ends": "a", "resumed begins": "a", "resumed ends": "b", "whole ends": "c", "again ends": "d"}
    losses, others = [4.0, 3.0, 2.0], [4.0, 3.0, 2.5]
    assert resume.verdict(states, losses, others, others).status == "PASS"
    assert resume.verdict(states | {"again ends": "c"}, losses, others, others).status == "FAIL"
    assert resume.verdict(states, losses[2:], others, others).said.startswith("a run did not take 3 steps")
