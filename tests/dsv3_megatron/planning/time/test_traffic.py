"""What a plan says is sent, against counting: the schedule's own messages, and every token of every expert group."""

import random

import pytest
import torch

from dsv3_megatron.model.layers import context
from dsv3_megatron.planning.memory.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import run_pipeline
from launcher.command_line.compose import compose
from parallel.groups import start_processes, stop_processes
from parallel.pipeline.transfers import Transfers
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import small_recipe, step_batches_of

SCHEDULES = [
    ("parallel.schedule=dualpipe",),
    ("parallel.schedule=1f1b",),
    ("parallel.schedule=dualpipev", "parallel.pipeline=8", "parallel.expert=32"),
    ("parallel.schedule=interleaved", "parallel.chunks=2", "parallel.pipeline=8", "optim.global_batch=16384"),
]


@pytest.mark.parametrize("overrides", SCHEDULES, ids=lambda words: words[0])
def test_pipeline_bytes_are_those_of_the_messages_that_the_schedule_sends(overrides):
    plan = make_plan(compose(["recipe=dsv3_671b", *overrides]), 2048, measure=estimate_stages)
    sent, received = [0] * plan.layout.pp, [0] * plan.layout.pp
    for rank, queues in enumerate(Transfers.of(plan.schedule).queues):
        for message in (m for queue in queues.values() for m in queue):
            sent[rank] += message.source == rank
            received[rank] += message.target == rank
    assert sum(sent) == sum(received)
    moved = plan.traffic()["pipeline"]
    planned = (moved.intra_bytes + moved.inter_bytes) / plan.model.traffic.message_bytes
    assert planned == pytest.approx(max(sent))  # ranks inside the pipeline; those at its ends send less


def test_an_nvlink_domain_is_planned_as_one_node_of_its_size():
    """gb200_256 has nodes of four GPUs, and what counts for its links is the rack."""
    layout = ("recipe=dsv3_671b", "parallel.pipeline=4", "parallel.expert=64", "parallel.schedule=1f1b",
              "parallel.stages=null")  # fmt: skip
    as_nodes = ("cluster.nodes=4", "cluster.gpus_per_node=64", "cluster.nvlink_domain=null")
    real, whole, apart = (
        make_plan(compose(["cluster=gb200_256", *layout, *words]), 256, measure=estimate_stages)
        for words in ((), as_nodes, ("cluster.nvlink_domain=null",))
    )
    assert real.traffic() == whole.traffic() and real.step == whole.step
    assert real.traffic()["expert dispatch"].inter_bytes == 0 < apart.traffic()["expert dispatch"].inter_bytes
    assert (real.recipe.cluster.nodes, real.recipe.cluster.gpus_per_node) == (64, 4)


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (("parallel.schedule=dualpipe",), 1),  # each end of the pipeline holds first and last stage
        (("parallel.schedule=dualpipev", "parallel.pipeline=8", "parallel.expert=32"), 1),
        (("parallel.schedule=1f1b",), 2),
        (("parallel.schedule=1f1b", "model.num_nextn_predict_layers=0"), 1),
    ],
)
def test_two_copies_of_the_embedding_are_kept_alike(overrides, copies):
    recipe = compose(["recipe=dsv3_671b", *overrides])
    moved = make_plan(recipe, 2048, measure=estimate_stages).traffic()["embedding all-reduce"]
    nbytes = 4 * recipe.model.vocab_size * recipe.model.hidden_size
    assert moved.inter_bytes == (nbytes if copies == 2 else 0)


def test_every_byte_that_ranks_dispatch_arrives_at_ranks():
    """Routing drawn token by token over EP 64: what all ranks send over each class of links is what all receive, and is
    what the plan says one rank sends, times 64."""
    recipe = compose(["recipe=dsv3_671b", "precision.fp8.dispatch=high"])
    plan = make_plan(recipe, 2048, measure=estimate_stages)
    rng, each = random.Random(0), 60
    sent, received = {"intra": 0, "inter": 0}, {"intra": 0, "inter": 0}
    for rank in range(64):
        for _ in range(each):
            groups = rng.sample(range(8), 4)
            experts = [32 * group + e for group in groups for e in rng.sample(range(32), 2)]
            targets = {expert // 4 for expert in experts}
            for node in {target // 8 for target in targets}:
                landing = node * 8 + rank % 8  # the rank of the same place in the other node hands on
                if node != rank // 8:
                    sent["inter"] += 1
                    received["inter"] += landing // 8 == node
                onward = {t for t in targets if t // 8 == node} - {landing}
                sent["intra"] += len(onward)
                received["intra"] += sum(t % 8 != landing % 8 for t in onward)
    assert sent == received
    token = recipe.model.hidden_size * 2
    planned = plan.model.traffic.dispatch()
    assert planned.inter_bytes / 4096 / token == pytest.approx(sent["inter"] / 64 / each, rel=0.03)
    assert planned.intra_bytes / 4096 / token == pytest.approx(sent["intra"] / 64 / each, rel=0.03)


def exchanged_over_context(overrides):
    """Return the bytes that this rank of two sent to the other over CP in a step."""
    recipe, world, sent = small_recipe(*overrides), World.from_environment(), []
    start_processes(world, torch.device("cpu"), timeout_seconds=200)
    exchange = context._exchange
    context._exchange = lambda x, group: sent.append(x.nbytes // 2) or exchange(x, group)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        run_pipeline(parts, step_batches_of(parts), training=True)
        return sum(sent)
    finally:
        context._exchange = exchange
        stop_processes()


def test_context_parallelism_sends_what_the_plan_says():
    cases = [
        ("parallel.context=2", f"parallel.recompute=[{names}]", *more)
        for names, more in (
            ("", ()),
            ("norm,mla_up", ()),
            ("full", ()),
            ("attention", ()),
            ("mla_up", ("precision=fp8",)),
        )
    ]
    for overrides, ranks in zip(cases, run_ranks(2, exchanged_over_context, cases)):
        link = "{gigabytes_per_second: 100, latency_microseconds: 1}"
        pair = ("cluster=h200_1", "cluster.gpus_per_node=2", f"cluster.intra_node={link}")
        plan = make_plan(small_recipe(*overrides, *pair), 2, measure=estimate_stages)
        moved = plan.traffic()["context parallel"]
        assert ranks == [moved.intra_bytes] * 2, overrides
