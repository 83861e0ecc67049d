"""What happens beside the steps, on real ranks: who holds the most memory, and when garbage is collected."""

import gc
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import dsv3_megatron.train.evaluation.scoring as scoring
import dsv3_megatron.train.trainer as trainer_module
from dsv3_megatron.report.panels import memory
from launcher.command_line.console import step_line
from testing.ranks import run_ranks
from testing.training.whole_runs import events, refusal, run_here, steps

MIB = 1 << 20
TEXT = ("data=stdlib", "model.vocab_size=512", "data.held_out_sequences=4")
FAILS = ("optim.learning_rate=1e17", "health.skip_limit=1", "health.skip_sigma=null")


def with_steps(step, overrides):
    """Train with ``step(train_step, number)`` in the place of every step; return the notes."""
    original, done = trainer_module.train_step, 0

    def counted(*arguments):
        nonlocal done
        done += 1
        return step(lambda: original(*arguments), done)

    trainer_module.train_step = counted
    try:
        return run_here(list(overrides))
    finally:
        trainer_module.train_step = original


def on_rank_one_more(overrides):
    """Train; rank 1 takes 300 MiB before the second step and gives them back at once: a peak stays a peak."""

    def step(train, number):
        if number == 2 and os.environ["RANK"] == "1":
            torch.ones(300 * MIB // 4)
        return train()

    return with_steps(step, overrides)


def test_the_peak_of_memory_is_that_of_the_fullest_rank(tmp_path):
    run_ranks(2, on_rank_one_more, [["run.steps=3", f"run.directory={tmp_path}"]])
    first, second, third = steps(tmp_path)
    assert second["memory_peak_bytes"] > first["memory_peak_bytes"] + 150 * MIB
    assert second["memory_peak_rank"] == third["memory_peak_rank"] == 1
    assert third["memory_peak_bytes"] >= second["memory_peak_bytes"]


def test_line_and_report_say_which_rank_it_is():
    values = dict.fromkeys(("lm_loss", "learning_rate", "grad_norm", "tokens_per_second"), 1.0)
    step = {**values, "step": 3, "skipped": 0}
    step |= dict.fromkeys(("mtp_loss", "max_violation", "bubble_fraction", "clipped_heads"))
    for rank, said in ((None, "1.0 GiB"), (5, "1.0 GiB on rank 5")):
        metrics = SimpleNamespace(**step, memory_peak_bytes=1 << 30, memory_peak_rank=rank)
        assert said in step_line(metrics, None, 1.0).split("  ")
    row = {"tokens": 1, "memory_peak_bytes": 1 << 30, "memory_peak_rank": 5}
    facts = SimpleNamespace(
        recipe=SimpleNamespace(cluster=SimpleNamespace(memory=0)), last=row, curve=lambda key: [(1.0, row[key])]
    )
    assert "now of rank 5" in memory(facts)


def collections(overrides):
    """Train, every step making cycles that automatic collection would look for; return what was seen.

    Returns: the step after which each collection ran (0: before the first), whether the collector is left as it was,
    and the notes.
    """
    seen, here = [], SimpleNamespace(step=0, trains=False)

    def note(phase, info):
        if phase == "start" and here.trains:
            seen.append(here.step)

    def step(train, number):
        here.trains = True
        result = train()
        for _ in range(20_000):
            cycle = []
            cycle.append(cycle)
        here.step = number
        return result

    gc.unfreeze()  # what testing/preload.py froze
    before = gc.isenabled(), gc.get_freeze_count()
    gc.callbacks.append(note)
    try:
        notes = with_steps(step, overrides)
    finally:
        gc.callbacks.remove(note)
    return seen, before == (gc.isenabled(), gc.get_freeze_count()), notes


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Of both ranks: collections of a run that asks for them every three steps, of one that leaves it to Python, of one
    that fails, and of one that saves."""
    place = tmp_path_factory.mktemp("garbage")
    cases = [
        ["run.steps=7", "run.collect_garbage_every_steps=3", f"run.directory={place}/three"],
        ["run.steps=2", "run.collect_garbage_every_steps=0", f"run.directory={place}/python"],
        ["run.steps=7", "run.collect_garbage_every_steps=3", f"run.directory={place}/fails", *FAILS],
        [
            "run.steps=9",
            "run.collect_garbage_every_steps=9",
            "checkpoint.every_steps=2",
            "checkpoint.asynchronous=false",
            f"run.directory={place}/saves",
        ],
    ]
    return run_ranks(2, collections, cases)


def test_garbage_is_collected_at_the_same_steps_of_all_ranks_and_never_between(collected):
    for seen, _, _ in collected[0]:
        assert seen[: seen.index(6) + 1] == [3, 6], "the end of the run may collect again"
    for seen, _, _ in collected[3]:
        assert seen[: seen.index(9) + 1] == [9], "nor at saves"
    for seen, _, _ in collected[1]:
        assert len(seen) > 2, "Python itself would have collected: the test can fail"


def test_the_collector_is_left_as_it_was_after_an_error_too(collected):
    for (_, same, notes), expected in zip((case[0] for case in collected), (False, False, True, False), strict=True):
        assert same and (refusal(notes) is not None) == expected, notes


def tensors_in_cycles(case):
    """Train; return the shapes of the tensors that each step but the first has left to the collector.

    ``case``: the recipe's words, and whether the step is made to leave one.
    """
    overrides, leaves_one = case
    found = []

    def step(train, number):
        gc.collect()
        gc.disable()
        result = train()
        if leaves_one:
            cycle = [torch.ones(7)]
            cycle.append(cycle)
            del cycle
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found.append([tuple(x.shape) for x in gc.garbage if isinstance(x, torch.Tensor)])
        gc.garbage.clear()
        gc.enable()
        return result

    with_steps(step, overrides)
    return found[1:]


def test_a_step_leaves_no_tensor_to_the_collector(tmp_path):
    """It would stay until the next collection: activations of many steps at once."""
    schedules = ("1f1b", "zb1p", "dualpipe", "dualpipev")
    words = ["run.steps=2", "parallel.pipeline=2"]
    cases = [([*words, f"parallel.schedule={name}", f"run.directory={tmp_path / name}"], False) for name in schedules]
    *left, seen = run_ranks(2, tensors_in_cycles, [*cases, ([*words, f"run.directory={tmp_path}/control"], True)])
    assert dict(zip(schedules, left, strict=True)) == {name: [[[]], [[]]] for name in schedules}
    assert seen == [[[(7,)]], [[(7,)]]], "what is left is found"


def stopped_in_a_task(overrides):
    """Train; rank 1 is asked to stop in the first round of requests. Returns how many rounds there were."""
    original, rounds = scoring.score, []

    def score(parts, source, *given):
        if isinstance(source, scoring._FilledUp):
            rounds.append(source)
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGUSR1)
        return original(parts, source, *given)

    scoring.score = score
    try:
        return refusal(run_here(list(overrides))), len(rounds)
    finally:
        scoring.score = original


def test_a_request_to_stop_ends_the_tasks_and_saves_the_step(tmp_path):
    row = {"context": "def ", "choices": ["read(", "(((", "return", " x"], "answer": 0}
    (tmp_path / "many.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    words = [*TEXT, "run.steps=5", f"run.directory={tmp_path}/run", f"evaluate.tasks=[{tmp_path}/many.jsonl]"]
    found = run_ranks(2, stopped_in_a_task, [[*words, "evaluate.every_steps=2"]])[0]
    assert found == [(None, 1), (None, 1)]
    run = tmp_path / "run"
    assert [line["step"] for line in steps(run)] == [1, 2]
    assert [event["step"] for event in events(run, "tasks_left_out")] == [2] and not events(run, "task")
    assert [event["step"] for event in events(run, "saved")] == [2]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_by_signal"] and summary["after"] is None and "tasks" not in summary
