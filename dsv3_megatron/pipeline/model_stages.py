"""What the engine runs: this rank's stages of the model, forward and backward, whole, split or overlapped.

Two ways to run a pass, chosen once per schedule. *Planned*: megatron-core's overlapped plan, in which dispatch and
combine of one microbatch hide behind attention and experts of another; schedules that overlap (FB) run every pass
through it. *Plain*: autograd, for schedules that never overlap.

Legend: B microbatch, S sequence on this rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import set_streams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from dsv3_megatron.model.depth_masks import KEY, DepthMasks
from dsv3_megatron.pipeline.scores import is_likeliest, sequence_scores
from dsv3_megatron.precision.products import Fp8Products
from parallel.pipeline.actions import Action
from parallel.pipeline.engine import Task

Batch = dict[str, Tensor]
Key = tuple[int, int]  # (stage, microbatch)


@dataclass
class _Plain:
    """A microbatch on a stage between its plain forward and backward."""

    activation: Tensor | None
    output: Tensor


class ModelStages:
    """The stages of this rank: implements parallel.pipeline.engine.Stages.

    Attributes:
        loss: [2] float64, of the step: sum of losses of the tokens that count, and how many they are, over the
            microbatches whose last stage is here.
        scores: of an evaluation: the sequences' scores (pipeline.scores) [B, 3], by microbatch whose last stage is
            here.
    """

    def __init__(
        self,
        chunks: dict[int, GPTModel],
        ddps: dict[int, DistributedDataParallel],
        *,
        last_stage: int,
        message: tuple[tuple[int, ...], torch.dtype, torch.device],
        embedding_is_shared: bool,
        always_splits: bool = False,
    ):
        """Take this rank's modules by stage.

        Args:
            chunks: stage -> module.
            ddps: the same, wrapped for gradient reduction.
            last_stage: of the whole model.
            message: shape [S, B, H], dtype and device of what passes between stages; S and B are the batches' own.
            embedding_is_shared: the last stage here uses the embedding of the first, which is here too.
            always_splits: the layers were built to leave their weight gradients to ``backward_dw``, in every schedule.
        """
        set_streams()  # the plan's compute and communication stream, on the device in use
        self._chunks, self._ddps, self._last = chunks, ddps, last_stage
        self._message = message
        self._ends_meet = (0, last_stage) if embedding_is_shared else ()
        self._splittable = {stage: list(_separable_leaves(chunk)) for stage, chunk in chunks.items()}
        modules = (module for chunk in chunks.values() for module in chunk.modules() if hasattr(module, "config"))
        self._configs = list({id(m.config): m.config for m in modules}.values())  # shared experts have one of their own
        self._live: dict[Key, _Plain | TransformerModelChunkSchedulePlan] = {}
        self._batches: list[Batch] = []
        self._planned = self._splits = self._training = False
        self._always_splits = always_splits
        self._reduced: set[int] = set()
        self.scores: dict[int, Tensor] = {}
        self.loss = torch.zeros(2, dtype=torch.float64, device=message[2])
        self.last_stage_microbatches = 0
        self.mtp_depth_decay = 1.0  # set by the trainer: a phase

    def begin(self, kinds: Set[str], batches: list[Batch], *, training: bool) -> None:
        """Prepare for a step over ``batches``, one per microbatch of the schedule: [B, S] tokens, labels and so on, all
        of one shape. ``kinds``, of the schedule's actions on all ranks (``Schedule.kinds``), say how passes are run."""
        self._planned, self._splits = "FB" in kinds, self._always_splits or not kinds.isdisjoint({"FB", "I", "W"})
        self._batches, self._training = batches, training
        self._message = (self._message_shape(batches[0]), *self._message[1:])
        Fp8Products.step += 1  # weights may have changed since the last one
        self._reduced.clear()
        self.loss.zero_()
        self.scores.clear()
        depths = sum(key.startswith(KEY) for key in batches[0])
        self.mtp_positions = torch.zeros(depths, dtype=torch.float64, device=self.loss.device)
        self.last_stage_microbatches = 0
        for chunk in self._chunks.values():
            chunk.config.overlap_moe_expert_parallel_comm = self._planned
            chunk.train(training)
            # Transformer Engine quantises a weight where it is told that a step begins, and uses that copy until it is
            # told again. Nothing else tells it: megatron-core does in the schedules that are not used here.
            chunk.set_is_first_microbatch()
        for config in self._configs:
            config.delay_wgrad_compute = self._splits

    def _message_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return [S, B, H] of what passes between stages: an evaluation's sequences may be shorter, and more of them in
        a microbatch, than training's. Under tensor parallelism a rank holds its share of the tokens."""
        count, length = batch["tokens"].shape
        return length // self._configs[0].tensor_model_parallel_size, count, self._message[0][-1]

    # -- what the engine calls -----------------------------------------------------------------------------------------

    def empty_message(self) -> Tensor:
        """Return a tensor [S, B, H] to receive an activation or a gradient into."""
        shape, dtype, device = self._message
        return torch.empty(shape, dtype=dtype, device=device)

    def forward(self, task: Task) -> None:
        """Run a forward, by megatron-core's overlapped plan where the schedule has backwards to overlap it with."""
        if self._planned:
            self._run_plans(task, None)
        else:
            self._plain_forward(task)

    def backward(self, task: Task) -> None:
        """Run a backward (B whole, I without weight gradients), in the way that its forward ran."""
        if self._planned:
            self._run_plans(None, task)
        else:
            self._plain_backward(task)

    def forward_backward(self, forward: Task, backward: Task) -> None:
        """Run both overlapped."""
        self._run_plans(forward, backward)

    def weight_gradient(self, action: Action) -> None:
        """Compute the oldest weight gradients that the stage has not computed yet."""
        with torch.no_grad():
            for leaf in self._splittable[action.stage]:
                leaf.backward_dw()

    def start_reduction(self, stage: int) -> None:
        """Start to reduce a stage's gradients; with a shared embedding the ends of the model go together."""
        self._reduced.add(stage)
        if stage in self._ends_meet:
            if not self._reduced.issuperset(self._ends_meet):
                return
            for end in sorted(self._ends_meet):
                self._ddps[end].start_grad_sync()
        else:
            self._ddps[stage].start_grad_sync()

    # -- plain ---------------------------------------------------------------------------------------------------------

    def _plain_forward(self, task: Task) -> None:
        action, activation = task.action, task.received
        chunk, batch = self._chunks[action.stage], self._batches[action.microbatch]
        if activation is not None:
            chunk.set_input_tensor([activation.requires_grad_(self._training)])
        with torch.set_grad_enabled(self._training):
            output = chunk(
                batch["tokens"],
                batch["position_ids"],
                batch.get("documents"),
                labels=batch["labels"] if self._training else None,  # without them the last stage returns logits
                loss_mask=self._mask(batch),
            )
        if self._training:
            self._live[action.stage, action.microbatch] = _Plain(activation, output)
        self._emit_output(task, output)
        if action.stage == self._last:
            self._count_loss(action, output if self._training else self._score(action, output))

    def _plain_backward(self, task: Task) -> None:
        action = task.action
        live = self._live.pop((action.stage, action.microbatch))
        torch.autograd.backward(live.output, self._gradient(task))
        if live.activation is not None:
            assert live.activation.grad is not None, "the stage reads its input"
            task.emit(live.activation.grad)
        if self._splits and action.kind == "B":
            self.weight_gradient(action)

    # -- planned -------------------------------------------------------------------------------------------------------

    def _run_plans(self, forward: Task | None, backward: Task | None) -> None:
        """Run a forward, a backward, or both overlapped, by megatron-core's plan."""
        forward_plan = self._plan(forward) if forward else None
        output = TransformerModelChunkSchedulePlan.run(
            forward_plan,
            self._take_plan(backward) if backward else None,
            b_grad=self._gradient(backward) if backward else None,
            post_forward=partial(self._emit_output, forward) if forward else None,
            post_backward=partial(self._emit_gradient, backward) if backward else None,
        )
        if forward:
            self._live[forward.action.stage, forward.action.microbatch] = forward_plan
            if forward.action.stage == self._last:
                self._count_loss(forward.action, output)

    def _plan(self, task: Task) -> TransformerModelChunkSchedulePlan:
        """Return the plan of a forward and of the backward that will follow it."""
        action, activation = task.action, task.received
        chunk, batch = self._chunks[action.stage], self._batches[action.microbatch]
        if activation is not None:
            chunk.set_input_tensor([activation.requires_grad_()])
        return chunk.build_schedule_plan(
            batch["tokens"],
            batch["position_ids"],
            batch.get("documents"),
            labels=batch["labels"] if action.stage == self._last else None,
            loss_mask=self._mask(batch),
        )

    def _take_plan(self, task: Task) -> TransformerModelChunkSchedulePlan:
        """Return the plan whose forward has run, for its backward."""
        plan = self._live.pop((task.action.stage, task.action.microbatch))
        if task.action.kind == "I":
            _leave_weight_gradients(plan)
        return plan

    def _emit_output(self, task: Task, output: Tensor, vp_stage: None = None) -> None:
        """Hand a forward's output on. megatron-core's plan calls this while other work is under way."""
        if task.action.stage < self._last:
            task.emit(output.detach())

    def _emit_gradient(self, task: Task, gradient: Tensor, vp_stage: None = None) -> None:
        """Hand the gradient of a stage's input on, likewise."""
        if task.action.stage > 0:
            task.emit(gradient)

    # -- loss ----------------------------------------------------------------------------------------------------------

    def _mask(self, batch: Batch) -> DepthMasks | Tensor:
        """Return what megatron-core weighs MTP losses with; the main loss is weighed by its gradient."""
        return DepthMasks.of(batch, self.mtp_depth_decay) or batch["loss_mask"]

    def _count_loss(self, action: Action, losses: Tensor) -> None:
        """Add a microbatch's losses [B, S] over the tokens that count."""
        mask = self._batches[action.microbatch]["loss_mask"].double()
        self.loss += torch.stack([(losses.detach().double() * mask).sum(), mask.sum()])
        batch = self._batches[action.microbatch]
        for depth in range(len(self.mtp_positions)):
            self.mtp_positions[depth] += batch[f"{KEY}{depth + 1}"].sum()
        self.last_stage_microbatches += 1

    def _score(self, action: Action, logits: Tensor) -> Tensor:
        """Keep the scores of an evaluation's microbatch, and return its losses [B, S] from logits [B, S, V / TP]."""
        batch = self._batches[action.microbatch]
        group, on_cpu = self._chunks[action.stage].pg_collection.tp, logits.device.type == "cpu"
        chosen = is_likeliest(logits, batch["labels"], group, host_may_wait=on_cpu)
        losses = vocab_parallel_cross_entropy(logits, batch["labels"])  # as in training; overwrites float32 logits
        self.scores[action.microbatch] = sequence_scores(losses, chosen, batch["loss_mask"])
        return losses

    def _gradient(self, task: Task) -> Tensor:
        """Return the gradient of a stage's output. On the last stage it is that of the summed loss: gradients are
        divided by the step's tokens once, at its end."""
        mask = self._batches[task.action.microbatch]["loss_mask"]
        return mask.float() if task.received is None else task.received


def _separable_leaves(chunk: GPTModel) -> Iterator[torch.nn.Module]:
    """Yield the layers whose weight gradient can be computed apart."""
    for module in chunk.modules():
        below = (m for m in module.modules() if m is not module)
        if hasattr(module, "backward_dw") and not any(hasattr(m, "backward_dw") for m in below):
            yield module


def _leave_weight_gradients(plan: TransformerModelChunkSchedulePlan) -> None:
    """Let a planned backward leave its weight gradients to a later W."""
    for number in range(plan.num_layers()):
        layer = plan.get_layer(number)
        for name in ("attn", "mlp"):
            getattr(layer, name).delay_wgrad_compute = False
