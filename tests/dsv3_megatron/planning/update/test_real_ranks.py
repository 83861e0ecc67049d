"""The end of a step as planned against real ranks: runs, exchange, bytes held, sent and saved, all exactly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_megatron.checkpoint.optimizer_states import prepare_moments
from dsv3_megatron.checkpoint.shares import shares_of
from dsv3_megatron.checkpoint.state import states_to_save
from dsv3_megatron.optim.optimizer import parts_of
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.goodput.stored import bytes_written
from dsv3_megatron.planning.update.holdings import group_of
from dsv3_megatron.planning.update.states import state_bytes_of_ranks
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import VALUES, small_recipe, step_batches_of

MUON = ("optim.name=muon", "model.num_hidden_layers=4", "optim.micro_batch=1", "data.sequence_length=16")
DUALPIPE = ("parallel.pipeline=2", "parallel.schedule=dualpipe")
CASES = {
    2: [
        (),
        ("parallel.tensor=2",),
        ("parallel.tensor=2", "parallel.expert_tensor=2", "optim.muon.query=head", "optim.muon.key_value=parts"),
        ("precision=bf16", "parallel.expert=2"),
        ("precision=bf16", "precision.moments=fp32", "optim.muon.nesterov=false"),
        ("precision.moments=bf16", "model.freeze=[embedding,layers.0-1,norms]"),
        ("optim.name=adamw", "precision=bf16", "optim.ema_decay=0.9"),
        ("optim.name=adamw", "parallel.pipeline=2", "parallel.schedule=1f1b", "model.freeze=[embedding,norms,experts]"),
    ],
    4: [
        ("parallel.expert=2",),
        (*DUALPIPE, "precision=bf16", "optim.ema_decay=0.9"),
        (*DUALPIPE, "parallel.expert=2", "model.freeze=[experts,layers.2-3]"),
        ("parallel.pipeline=2", "parallel.schedule=1f1b", "precision=bf16"),  # both ends train an embedding
        ("parallel.pipeline=2", "parallel.tensor=2", "parallel.schedule=dualpipev"),
        ("parallel.tensor=2", "parallel.expert=2", "model.q_lora_rank=null", "model.n_shared_experts=0"),
    ],
}
CASES = {world: [(*MUON, *words) for words in cases] for world, cases in CASES.items()}


def found_by_a_rank(words: tuple[str, ...]) -> dict[str, Any]:
    """Return what this rank of a real run updates, holds and sends, and its exchange's plan."""
    recipe, world = small_recipe(*words), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        prepare_moments(parts.optimizer)
        shares = shares_of(parts.chunks, parts.optimizer, parts.groups)
        saved = states_to_save(parts, shares)
        exchanges = {
            not getattr(part.buffers[0].params[0], "allreduce", True): part.optimizer.exchange
            for part in parts_of(parts.optimizer)
            if hasattr(part.optimizer, "exchange")
        }
        train_step(parts, step_batches_of(parts), VALUES, lambda loss, norm: True)
        return {
            "rank": world.rank,
            "runs": {(s.pieces[0].key, s.start, s.end) for s in shares if s.parameter.requires_grad and s.pieces},
            "saved": sum(entry.tensor.nbytes for each in saved.values() for entry in each if entry.writes),
            "states": sum(_state_bytes(part, recipe) for part in parts_of(parts.optimizer)),
            "plans": {experts: exchange.plan for experts, exchange in exchanges.items()},
            "sent": {experts: (x.bytes_sent, x.bytes_received) for experts, x in exchanges.items()},
        }
    finally:
        stop_processes()


def _state_bytes(part: Any, recipe: Any) -> int:
    """Return the bytes of the tensors that a part's optimizer keeps from step to step, masters among them."""
    held = {t.untyped_storage()._cdata: t for state in part.optimizer.state.values() for t in _tensors(state)}
    masters = [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
    return sum(t.nbytes for t in [*held.values(), *masters])


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("world", CASES)
def test_what_every_rank_updates_holds_and_sends_is_planned_exactly(world):
    for words, ranks in zip(CASES[world], run_ranks(world, found_by_a_rank, CASES[world])):
        recipe = small_recipe(*words)
        layout = recipe.layout(world)
        layers = layers_of_stages(recipe)
        for found in ranks:
            compare(recipe, layout, layers, found, str(words))


def compare(recipe, layout, layers, found, words):
    """Assert that the plan of a rank is what it has done."""
    rank, at = found["rank"], layout.coordinates(found["rank"])
    dense = group_of(recipe, layout, layers, at["pp"], experts=False)
    experts = group_of(recipe, layout, layers, at["pp"], experts=True, ep_rank=at["ep"])
    stage = layout.world_size // layout.pp
    states = state_bytes_of_ranks(recipe, layout, at["pp"], dense, experts)
    assert states[rank % stage] == found["states"], words
    assert bytes_written(recipe, layout, layers)[rank] == found["saved"], words
    runs = set()
    for of_experts, group in ((False, dense), (True, experts)):
        place = group.members.index(rank)
        runs |= {(run.parameter.key, run.start, run.end) for run in group.runs[place // group.split]}
        if group.plan is None:
            assert found["plans"].get(of_experts) is None, words
            continue
        planned, real = group.plan, found["plans"][of_experts]
        for name in ("shapes", "owner", "rounds", "holdings"):
            assert getattr(planned, name) == getattr(real, name), (words, name)
        sent, received = planned.traffic(place)
        assert (4 * sent, 4 * received) == found["sent"][of_experts], words
    assert runs == found["runs"], words
