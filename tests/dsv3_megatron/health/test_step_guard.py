"""Steps that are not taken, going back, slow ranks, hangs and signals: real runs of several processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore

import dsv3_megatron.train.run as run_module
import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.health.settings import HealthSettings
from dsv3_megatron.health.step_guard import HealthState, StepGuard
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.errors import UserError
from parallel.pipeline.watchdog import Watchdog
from parallel.world import World
from testing.lanes import InLanes, examples, names_in_lanes
from testing.ranks import run_ranks
from testing.training.checkpoints import assert_same_tensors
from testing.training.tiny import small_recipe
from testing.training.whole_runs import events, steps

BASE = ("parallel.expert=2", "run.steps=6", "checkpoint.every_steps=2", "checkpoint.keep=9", "optim.learning_rate=0.01")


def rank():
    return int(os.environ["RANK"])


def run_case(case):
    """Train; ``case["faults"]`` maps a call of the trainer's step to what happens in it: a poisoned gradient, a signal,
    a delay. Returns the refusal, if any."""
    torch.set_num_threads(1)
    recipe = small_recipe(*BASE, *case["overrides"], f"run.directory={case['directory']}")
    original, build, calls, built = trainer_module.train_step, run_module.build_parts, 0, []

    def remember(*arguments):
        built.append(build(*arguments))
        if case.get("slow") == rank():
            for name, module in built[-1].whole_model.named_modules():
                if name.endswith("self_attention.linear_proj"):
                    module.register_forward_hook(lambda *unused: time.sleep(0.01))
        return built[-1]

    def step(parts, *given):
        nonlocal calls
        calls += 1
        kind = case.get("faults", {}).get(calls)
        if kind == "bad batch":
            hook = parts.whole_model.output_layer.register_forward_hook(lambda m, i, o: (100 * o[0], *o[1:]))
            try:
                return original(parts, *given)
            finally:
                hook.remove()
        if kind in ("nan", "inf", "1e4") and rank() == 1:
            poisoned, reduce = parts.ddps[0], parts.ddps[0].start_grad_sync

            def poison():
                parts.whole_model.decoder.final_layernorm.weight.main_grad[0] = float(kind)
                reduce()
                poisoned.start_grad_sync = reduce

            poisoned.start_grad_sync = poison
        if kind in ("term", "usr1") and rank() == 1:
            os.kill(os.getpid(), {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}[kind])
        return original(parts, *given)

    trainer_module.train_step, run_module.build_parts = step, remember
    try:
        run_module.run(recipe, World.from_environment(), SilentReporter(), resolved_yaml(recipe))
        return None
    except UserError as error:
        return str(error)
    finally:
        trainer_module.train_step, run_module.build_parts = original, build


CASES = {
    "plain": {},
    "nan": {"faults": {3: "nan"}},
    "inf": {"faults": {3: "inf"}},
    "1e4": {"faults": {5: "1e4"}, "overrides": ("health.skip_window=8",)},
    "bad batch": {"faults": {5: "bad batch"}, "overrides": ("health.skip_window=8",)},
    "nan in a row": {"faults": {n: "nan" for n in range(3, 9)}, "overrides": ("health.skip_limit=2",)},
    "rolled back": {
        "faults": {3: "nan", 4: "nan"},
        "overrides": ("health.skip_limit=2", "health.rollbacks=1"),
    },
    "slow": {"slow": 1, "overrides": ("health.straggler_every_steps=2",)},
    "term": {"faults": {3: "term"}},
    "usr1": {"faults": {3: "usr1"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name -> (directory, refusal of rank 0, refusal of rank 1)."""

    def run(cases):
        place = tmp_path_factory.mktemp("health")
        given = [{"overrides": (), **case, "directory": place / name.replace(" ", "_")} for name, case in cases.items()]
        for case, result in zip(given, run_ranks(2, run_case, given)):
            yield case["directory"], *result

    return InLanes(CASES, run, "plain", "nan", "bad batch", "nan in a row", "slow", "term")


@pytest.mark.parametrize("kind", names_in_lanes(["nan", "inf"], "nan"))
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(runs, kind):
    directory, *refusals = runs[kind]
    assert refusals == [None, None]
    lines, plain = steps(directory), steps(runs["plain"][0])
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert lines[2]["grad_norm"] is None and lines[2]["lm_loss"] == plain[2]["lm_loss"]
    assert lines[3]["lm_loss"] != plain[3]["lm_loss"] and lines[3]["tokens"] == plain[3]["tokens"]
    assert all(line["lm_loss"] is not None for line in lines), "the weights stayed finite"
    (event,) = events(directory, "skipped")
    assert event["step"] == 3 and "gradient norm is" in event["reason"]


@pytest.mark.parametrize(
    ("kind", "what"), [pytest.param("1e4", "gradient norm", marks=pytest.mark.full), ("bad batch", "loss")]
)
def test_a_finite_spike_is_skipped_and_the_run_goes_on(runs, kind, what):
    directory, *refusals = runs[kind]
    assert refusals == [None, None]
    lines, plain = steps(directory), steps(runs["plain"][0])
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 1]
    assert lines[3]["lm_loss"] == plain[3]["lm_loss"], "nothing else differs"
    (event,) = events(directory, "skipped")
    assert event["step"] == 5 and event["reason"].startswith(f"{what} ") and "deviations above" in event["reason"]


def test_skipped_steps_in_a_row_end_the_run_and_name_the_parameter(runs):
    directory, *refusals = runs["nan in a row"]
    for refusal in refusals:
        assert refusal.startswith("health: 2 steps in a row were skipped") and "\n" not in refusal
        assert "decoder.final_layernorm.weight" in refusal and "optim.learning_rate" in refusal
    assert len(events(directory, "skipped")) == 2
    assert not (directory / "finished").exists()


@pytest.mark.full
def test_a_rollback_goes_back_to_the_checkpoint_and_past_the_data(runs):
    directory, *refusals = runs["rolled back"]
    assert refusals == [None, None]
    (event,) = events(directory, "rolled_back")
    assert (event["step"], event["to_step"], event["samples"]) == (4, 2, 4 * 8)
    lines = steps(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6], "the steps done again are there once"
    # Step 3 now reads what the undisturbed run reads in step 5, with the weights of step 2.
    assert lines[2]["lm_loss"] != steps(runs["plain"][0])[2]["lm_loss"]
    assert lines[-1]["skipped"] == 0 and (directory / "finished").exists()


def test_a_slow_rank_is_named(runs):
    directory, *_ = runs["slow"]
    assert {line["slowest_rank"] for line in steps(directory)[1:]} == {1}
    assert min(line["slowest_ratio"] for line in steps(directory)[1:]) > 1.3
    found = events(directory, "straggler")
    assert found and all(event["rank"] == 1 and event["host"] for event in found)


@pytest.mark.parametrize("name", names_in_lanes(["term", "usr1"], "term"))
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_later(runs, name):
    directory, *refusals = runs[name]
    assert refusals == [None, None], "left without an error: exit code 0"
    assert steps(directory)[-1]["step"] == 3 and not (directory / "finished").exists()
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000003\n"
    case = {"overrides": (), "directory": directory}
    assert run_ranks(2, run_case, [case]) == [[None, None]]
    assert (directory / "finished").exists()
    final = "checkpoints/step_00000006"
    assert_same_tensors(directory / final, runs["plain"][0] / final)


# -- the rule ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=examples(50))
@given(st.lists(st.floats(-1, 1), min_size=64, max_size=128), st.floats(1.01, 1e6, allow_subnormal=False))
def test_a_step_is_skipped_exactly_above_six_deviations(noise, factor):
    noise[0], noise[1] = -1.0, 1.0  # some deviation there is
    recent = torch.tensor(noise, dtype=torch.float64)
    six = (6 * recent.std()).item()
    for name in ("loss", "norm"):
        for times, expected in ((0.99, True), (factor, False)):
            guard = StepGuard(HealthSettings(), HealthState(list(noise), list(noise)))
            value = recent.mean().item() + times * six
            mean = recent.mean().item()
            assert guard.allows(*((value, mean) if name == "loss" else (mean, value))) is expected


def test_the_rule_is_olmo_cores():
    """Mean and deviation over the window before the step, both of loss and norm; half a window at least."""
    guard = StepGuard(HealthSettings(skip_window=4), HealthState())
    assert guard.allows(1.0, 1.0)
    assert guard.allows(99.0, 1.0), "too little is known to object"
    guard = StepGuard(HealthSettings(skip_window=4), HealthState([1.0, 2.0, 1.0, 2.0], [1.0, 1.2, 1.0, 1.2]))
    assert guard.allows(1.5 + 6 * 0.577, 1.0)
    assert not guard.allows(1.5 + 60, 1.0) and guard.state.skipped_in_row == 1
    guard = StepGuard(HealthSettings(skip_window=4), HealthState([1.0, 2.0, 1.0, 2.0], [1.0, 1.2, 1.0, 1.2]))
    assert not guard.allows(1.5, 1.1 + 6 * 0.116) and "gradient norm" in guard.reason
    assert guard.allows(1.5, 1.1) and guard.state.skipped_in_row == 0


def test_nothing_that_is_not_finite_enters_the_window():
    guard = StepGuard(HealthSettings(skip_limit=3), HealthState())
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not guard.allows(value, 1.0) and not guard.allows(1.0, value)
    assert guard.state.losses == [] and guard.exhausted


# -- hangs -------------------------------------------------------------------------------------------------------------

HANGING = """
import sys, time
from torch.distributed import HashStore
from parallel.pipeline.watchdog import Watchdog
dog = Watchdog(0.2, rank=0, world_size=1, store=HashStore(), abort_seconds=1.0)
def stands_here():
    dog.enter("the end of the step")
    time.sleep(60)
if sys.argv[1] == "phase":
    with dog.phase("loading", 2.0):
        stands_here()
stands_here()
"""


@pytest.mark.parametrize(
    ("where", "told", "ended"),
    [
        ("training", "no action ended for 0.2 s of training", "1 s in the end of the step"),
        ("phase", "loading is not over after 2 s", "2 s in loading: the end of the step"),
    ],
)
def test_a_process_that_hangs_tells_where_and_ends_itself(tmp_path, where, told, ended):
    start = time.monotonic()
    place = {"training": str(tmp_path / "rank-"), "phase": str(tmp_path / "absent" / "rank-")}[where]
    environment = os.environ | {"TORCH_FR_DUMP_TEMP_FILE": place}
    (tmp_path / "rank-0").symlink_to(tmp_path / "precious")
    done = subprocess.run(
        [sys.executable, "-c", HANGING, where], capture_output=True, text=True, timeout=50, env=environment
    )
    assert done.returncode == 70 and time.monotonic() - start < 40
    assert f"hang: {told}; where each rank is:" in done.stderr
    assert "stands_here" in done.stderr and f"rank 0 ends itself after {ended}" in done.stderr
    if where == "training":  # torch's flight recorder, in the format that its own tool reads
        kept = (tmp_path / "rank-0").read_bytes()
        assert b"pg_config" in kept and not (tmp_path / "precious").exists()
    else:
        assert "rank-0 cannot be written (No such file or directory)" in done.stderr


class MovingGpu:
    """Ends something every twentieth of a second for a second, then stands; or has ended all then."""

    def __init__(self, stands):
        self.start, self.stands = time.monotonic(), stands

    @property
    def moved_at(self):
        return self.start + min(time.monotonic() - self.start, 1.0) // 0.05 * 0.05

    def oldest(self):
        over = time.monotonic() - self.start >= 1.0
        return None if over and not self.stands else ("action 1 of 2", self.moved_at)


@pytest.mark.parametrize("stands", [True, False])
def test_a_host_that_waits_for_a_gpu_that_moves_does_not_hang(stands):
    told = []
    dog = Watchdog(0.6, rank=0, world_size=1, store=HashStore(), report=told.append)
    dog._launches = gpu = MovingGpu(stands)
    dog.enter("the end of the step")
    while time.monotonic() - gpu.start < 1.2:  # twice as long as an action may take
        assert not told
        time.sleep(0.02)
    while not told and time.monotonic() - gpu.start < 30:
        time.sleep(0.02)
    dog.close()
    assert ("action 1 of 2, on the GPU" in told[0]) == stands
