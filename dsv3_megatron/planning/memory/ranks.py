"""Memory of every pipeline rank: what is there all the time, and the fullest moment of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsv3_megatron.planning.memory.stage_memory import StageMemory
from dsv3_megatron.planning.memory.te_gradients import placeholder_bytes
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout
from parallel.pipeline.actions import Action, Schedule, Step
from parallel.pipeline.posting import AHEAD
from parallel.pipeline.transfers import Transfers

if TYPE_CHECKING:
    from dsv3_megatron.planning.update.muon import RankUpdate

# What torch's caching allocator cannot hand out, as a share of activations. An allowance, not a measurement.
FRAGMENTATION = 0.03
_GRADIENT_BYTES = 4  # accumulated and reduced in float32 (arXiv 2412.19437 section 3.3.3)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank (each of its data-parallel ranks holds as much).

    ``update_bytes``: while the optimizer updates, beside its states, when nothing else moves any more.
    """

    pipeline_rank: int
    weights_bytes: int
    fp8_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    messages_bytes: int
    fragmentation_bytes: int
    reserved_bytes: int
    limit_bytes: int | None
    live_microbatches: int
    fullest_action: str
    update_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        held = self.weights_bytes + self.fp8_weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return held + max(self.moving_bytes, self.update_bytes) + self.reserved_bytes

    @property
    def moving_bytes(self) -> int:
        """What is there only while the pipeline runs."""
        return self.activations_bytes + self.messages_bytes + self.fragmentation_bytes

    @property
    def fits(self) -> bool:
        """Whether it is within the device's memory; True where that is not known."""
        return self.limit_bytes is None or self.total_bytes <= self.limit_bytes


@dataclass(frozen=True)
class Held:
    """Parameters a rank holds, by how they are sharded in the optimizer, and how many of either are frozen."""

    dense: int
    experts: int
    in_fp8: int
    frozen_dense: int = 0
    frozen_experts: int = 0

    @property
    def all(self) -> int:
        """Dense and experts."""
        return self.dense + self.experts

    @property
    def trained_dense(self) -> int:
        """Of ``dense``, those that have gradients and optimizer states."""
        return self.dense - self.frozen_dense

    @property
    def trained_experts(self) -> int:
        """Likewise of ``experts``."""
        return self.experts - self.frozen_experts

    @property
    def trained(self) -> int:
        """All that have gradients."""
        return self.trained_dense + self.trained_experts

    def shard(self, layout: Layout, copies: int) -> float:
        """Return how many of them one rank updates (ZeRO-1).

        Args:
            copies: ranks of the pipeline that hold the same stages (2 under DualPipe): they share the shards.
        """
        dense, experts = layout.dp * layout.cp * copies, layout.expert_dp * copies
        return self.trained_dense / dense + self.trained_experts / experts


def held_parameters(
    recipe: Recipe, layout: Layout, stages: Sequence[int], memory: Sequence[StageMemory], last: int
) -> Held:
    """Return the parameters of a rank's stages; an embedding that two stages of one rank share counts once."""
    shared = 0
    if {0, last} <= set(stages) and last > 0 and recipe.model.num_nextn_predict_layers:
        shared = recipe.model.vocab_size * recipe.model.hidden_size // layout.tp
    experts = sum(memory[s].expert_parameters for s in stages)
    dense = sum(memory[s].parameters for s in stages) - experts - shared
    frozen_experts = sum(memory[s].frozen_experts for s in stages)
    frozen = sum(memory[s].frozen for s in stages) - frozen_experts
    frozen -= shared if "embedding" in recipe.model.freeze else 0
    return Held(dense, experts, sum(memory[s].fp8_parameters for s in stages), frozen, frozen_experts)


def optimizer_bytes(recipe: Recipe, layout: Layout, held: Held, *, copies: int) -> int:
    """Return a rank's shard of master weights and AdamW's moments (ZeRO-1).

    Args:
        copies: as for :meth:`Held.shard`.
    """
    return round(bytes_of_number(recipe, moments=2) * held.shard(layout, copies))


def bytes_of_number(recipe: Recipe, *, moments: int) -> int:
    """Return the bytes of a number's optimizer states: so many moments, and the master where it is not the weight."""
    precision = recipe.precision
    # An optimizer of BF16 moments keeps masters of float32 weights too (megatron-core 0.16.1).
    master = 0 if precision.parameters == precision.moments == "fp32" else 4
    return moments * (2 if precision.moments == "bf16" else 4) + master


def rank_memory(
    recipe: Recipe,
    layout: Layout,
    schedule: Schedule,
    memory: Sequence[StageMemory],
    held: Held,
    rank: int,
    messages: int,
    update: RankUpdate | None = None,
) -> RankMemory:
    """Return the memory of pipeline rank ``rank``.

    Args:
        memory: of every stage.
        held: the rank's parameters.
        messages: waiting to be taken or on their way (:func:`receives_ahead`).
        update: Muon's, where that is the optimizer.
    """
    place = schedule.placement
    stages = place.stages_of(rank)
    on_cpu = recipe.cluster.device == "cpu"
    copies = 2 if place.mirrored else 1
    activations, at = fullest_moment(schedule, rank, memory, sends_stay=on_cpu)
    activations += max(memory[s].held for s in stages)
    weight = 2 if recipe.precision.parameters == "bf16" else 4
    fp8 = recipe.precision.fp8
    only_fp8 = fp8 is not None and fp8.hold_weights
    found = RankMemory(
        pipeline_rank=rank,
        weights_bytes=(held.all - (held.in_fp8 if only_fp8 else 0)) * weight,
        # Transformer Engine keeps an FP8 weight by rows and by columns (blockwise scaling on Hopper); the emulation
        # keeps what survives FP8 in float32.
        fp8_weights_bytes=held.in_fp8 * (4 if on_cpu else 2),
        gradients_bytes=held.trained * _GRADIENT_BYTES + placeholder_bytes(recipe, layout, stages),
        optimizer_bytes=update.state_bytes if update else optimizer_bytes(recipe, layout, held, copies=copies),
        activations_bytes=activations,
        messages_bytes=messages * memory[0].message,
        fragmentation_bytes=0 if on_cpu else round(FRAGMENTATION * activations),
        reserved_bytes=recipe.cluster.reserved,
        limit_bytes=recipe.cluster.memory or None,
        live_microbatches=schedule.peak_microbatches[rank],
        fullest_action=str(at),
        update_bytes=update.exchange_bytes if update else 0,
    )
    if found.update_bytes > found.moving_bytes:
        return replace(found, fullest_action="the optimizer's update")
    return found


def fullest_moment(
    schedule: Schedule, rank: int, memory: Sequence[StageMemory], *, sends_stay: bool = False
) -> tuple[int, Step | None]:
    """Return the most bytes of activations at once on a rank, and during which action.

    Between passes a microbatch holds ``kept`` (after its forward) or ``kept_deferred`` (while its weight gradient is
    deferred); inside a pass it peaks. ``sends_stay``: what was sent
    is let go only at the end of the step, as gloo tells that a send has left only when it is waited for.
    """
    place, last = schedule.placement, schedule.stages - 1

    def sent(part: Action) -> int:
        """Return the messages that a microbatch's forward and backward on a stage have sent to other ranks."""
        neighbours = [s for s in (part.stage - 1, part.stage + 1) if 0 <= s <= last]
        return sum(place.rank_of(s, part.microbatch) != rank for s in neighbours) if sends_stay else 0

    now, peak, at = 0, 0, None
    for step in schedule.ranks[rank]:
        level, after = now, now
        for part in step.parts:
            stage = memory[part.stage]
            if part.kind == "F":
                # The peak of an overlapped backward was measured beside a forward: that one adds what it keeps.
                level += stage.kept if step.kind == "FB" else stage.peak_forward
                after += stage.kept
            elif part.kind in "BI":
                level += stage.peak_backward - stage.kept
                after += (stage.kept_deferred if part.kind == "I" else 0) - stage.kept + sent(part) * stage.message
            else:
                level += stage.peak_weight_grad - stage.kept_deferred
                after -= stage.kept_deferred
        if level > peak:
            peak, at = level, step
        now = after
    return peak, at


def receives_ahead(schedule: Schedule) -> list[int]:
    """Return, per pipeline rank, the messages in its memory that no stage has taken or made yet.

    ``AHEAD`` receives are posted ahead to each peer, and a send lives until it has left (parallel.pipeline.engine).
    """
    return [(AHEAD + 1) * len(peers) for peers in Transfers.of(schedule).queues]
