"""Whole runs of the tiny model over NCCL's manners: evaluations, steps, saves, and no race on any stream."""

import contextlib
import re

import pytest
import torch
from megatron.core.pipeline_parallel import utils as plan

import dsv3_megatron.train.run as run
from launcher.command_line.compose import resolved_yaml
from launcher.command_line.console import SilentReporter
from parallel.groups import stop_processes
from parallel.world import World
from testing.nccl.ranks import nccl_rank
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe

RUN = (
    "run.steps=2",
    "checkpoint.every_steps=1",
    "optim.micro_batch=1",
    "data.sequence_length=16",
    "health.straggler_every_steps=1",
)
LAYOUTS = {
    "dualpipe PP2 EP2": (4, ("parallel.pipeline=2", "parallel.expert=2", "parallel.schedule=dualpipe")),
    "dualpipev PP2": (2, ("parallel.pipeline=2", "parallel.schedule=dualpipev", "optim.global_batch=4")),
    "TP2, Muon": (2, ("parallel.tensor=2", "optim.name=muon", "optim.global_batch=4")),
    "dualpipe PP2 EP2, Muon": (4, ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.name=muon")),
    "zb1p PP4": (4, ("parallel.pipeline=4", "parallel.schedule=zb1p", "optim.global_batch=4")),
    "interleaved PP3": (
        3,
        (
            "parallel.pipeline=3",
            "parallel.schedule=interleaved",
            "parallel.chunks=2",
            "model.num_hidden_layers=6",
            "optim.global_batch=6",
        ),
    ),
}


class Losses(SilentReporter):
    """Keeps what was measured."""

    def __init__(self):
        self.values = []

    def step(self, metrics, last_step):
        self.values.append((metrics.lm_loss, metrics.grad_norm))

    def evaluation(self, step, values):
        self.values.append(values["held_out_loss"])


def run_recipe(case):
    """Train as a user would; return what rank 0 measured, or how this rank failed."""
    overrides, over_nccl, change = case
    torch.set_num_threads(1)
    world, losses = World.from_environment(), Losses()
    recipe = small_recipe(*overrides)
    with contextlib.ExitStack() as stack:
        if over_nccl:
            stack.enter_context(nccl_rank(world.rank, stuck_seconds=30))
        stack.enter_context(change())
        try:
            run.run(recipe, world, losses, resolved_yaml(recipe))
        except AssertionError as error:
            stop_processes()  # the run leaves that to the end of its process
            return str(error)
    return losses.values


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (3, 4))])
def test_a_run_over_nccls_manners_is_the_run_over_gloo(ranks, tmp_path):
    asked = {name: (*RUN, *overrides) for name, (many, overrides) in LAYOUTS.items() if many == ranks}
    cases = [
        ((*overrides, f"run.directory={tmp_path}/{number}_{over_nccl}"), over_nccl, contextlib.nullcontext)
        for number, overrides in enumerate(asked.values())
        for over_nccl in (False, True)
    ]
    found = [of_ranks[0] for of_ranks in run_ranks(ranks, run_recipe, cases)]
    for name, gloo, nccl in zip(asked, found[::2], found[1::2]):
        assert nccl == gloo, (name, nccl)
        assert len(gloo) == 4, "a loss before, two steps, a loss after"


@contextlib.contextmanager
def no_wait_between_nodes():
    """The parts of a layer on two streams, without the event that orders them."""

    @contextlib.contextmanager
    def acquire(stream, event):
        yield
        event.record(stream)

    before, plan.stream_acquire_context = plan.stream_acquire_context, acquire
    try:
        yield
    finally:
        plan.stream_acquire_context = before


@contextlib.contextmanager
def nothing_recorded():
    """Memory that goes back to its stream whatever another does with it."""
    before, torch.Tensor.record_stream = torch.Tensor.record_stream, lambda self, stream: None
    try:
        yield
    finally:
        torch.Tensor.record_stream = before


FAULTS = {
    no_wait_between_nodes: r"rank 0, action 0F0 > layer_\df > moe_\w+ forward: aten.* on stream \d+ is reading from "
    r"what aten.* on the default stream .* is writing to, and no event or wait orders the two",
    nothing_recorded: r"rank 0, action 1B4 > .*: aten.* takes memory on .* that was .* while .* may still run aten.*; "
    "record_stream was not called",
}


def test_a_missing_event_or_record_in_the_overlapped_plan_is_named(tmp_path):
    overrides = (*RUN, "parallel.pipeline=2", "parallel.schedule=dualpipe", "run.steps=1")
    cases = [((*overrides, f"run.directory={tmp_path}/{fault.__name__}"), True, fault) for fault in FAULTS]
    for (_, _, fault), ranks in zip(cases, run_ranks(2, run_recipe, cases)):
        assert any(isinstance(text, str) and re.search(FAULTS[fault], text) for text in ranks), (fault.__name__, ranks)
