"""What a stage holds, by formula: the fast path of the planner, for searches and for ``--fast``. No torch.

The exact path runs the real modules (activations.py); these formulae say what it found, term by term, and a test holds
them to it. They know the torch backend's modules as a GPU's kernels keep them.

Legend: T tokens of a microbatch on this rank, G tokens where TP ranks share widths, R rows of this rank's experts, D
hidden size, I width of SwiGLU's output. "+ scales": FP8 has a float32 a 128 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.model.costs import attention_parameters
from dsv3_megatron.planning.stage_memory import StageMemory, composition
from dsv3_megatron.recipe import Recipe
from parallel.actions import Schedule
from parallel.layout import Layout

_WITH_SCALES = 1 + 4 / 128
# Copies of the tokens of a rank's experts that a forward, and a backward beside a forward, hold for a moment: sent,
# received, sorted, multiplied.
_MOMENTARY_FORWARD, _MOMENTARY_BACKWARD = 4.0, 7.3


@dataclass(frozen=True)
class _Bytes:
    kept: float
    owed: float


class _Sizes:
    """Sizes of a recipe on a layout, and what its parts keep."""

    def __init__(self, recipe: Recipe, layout: Layout, *, planned: bool):
        self.recipe, self.layout, self.model = recipe, layout, recipe.model
        self.planned = planned  # run through megatron-core's overlapped plan, which keeps one more tensor a layer
        self.t = recipe.optim.micro_batch * recipe.data.sequence_length / (layout.cp * layout.tp)
        self.g = self.t * layout.tp
        self.r = self.t * self.model.num_experts_per_tok * layout.expert_tp
        self.d = self.model.hidden_size
        self.size = 2 if recipe.precision.parameters == "bf16" else 4
        self.fp8 = recipe.precision.fp8
        self.recompute = set(recipe.parallel.recompute)
        self.message = self.t * self.d * self.size
        self.linear = _WITH_SCALES if self.fp8 else self.size  # bytes of a number that a linear layer keeps

    def attention(self) -> _Bytes:
        model, tp = self.model, self.layout.tp
        heads = model.num_attention_heads / tp
        qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        query_latent = model.q_lora_rank or 0
        latents = query_latent + model.kv_lora_rank
        down = query_latent + model.kv_lora_rank + model.qk_rope_head_dim
        output_cache = self.fp8.attention_output_cache if self.fp8 else None
        out = self.g * heads * v * (1.5 + 4 / 128 if output_cache == "e5m6" else self.size)
        if output_cache == "high":
            out += self.g * heads * v * _WITH_SCALES  # the linear layer's own copy
        kept = out + self.g * heads * 4 + self.t * down * self.size
        if "norm" not in self.recompute:  # in FP8 each of the two down-projections keeps a copy of its own
            kept += self.t * self.d * (2 * _WITH_SCALES if self.fp8 else self.size)
        if "mla_up" in self.recompute:
            kept += self.t * latents * self.size
        else:
            kept += self.g * heads * (2 * qk + v) * self.size + self.g * latents * self.linear
        ups = self.g * heads * ((qk if query_latent else 0) + model.qk_nope_head_dim + v)
        owed = (ups + 2 * self.t * self.d + self.t * self.d + self.g * latents + self.t * down) * self.linear + out
        return _Bytes(kept, owed)

    def feed_forward(self, width: float, *, recomputed: bool) -> _Bytes:
        """SwiGLU with its two layers outside the experts."""
        g, d = self.g, self.d
        cached = self.fp8 is not None and self.fp8.swiglu_cache == "e4m3"
        if recomputed:
            kept = 0.0
        else:  # SwiGLU keeps its input, the second layer its own
            kept = 2 * g * width * (_WITH_SCALES if cached else self.size)
            kept += 0.0 if cached else g * width * self.linear
            again = "norm" in self.recompute and self.layout.tp == 1
            kept += g * d * _WITH_SCALES if self.fp8 and not again else 0.0
        owed = (2 * g * width * 2 + 2 * g * d) * self.linear if cached else (3 * g * width + 2 * g * d) * self.linear
        return _Bytes(kept, owed)

    def dense(self) -> _Bytes:
        """A dense layer: residual sums, attention, feed-forward."""
        attention = self.attention()
        # Under DualPipe's plan the recomputation of a dense layer's feed-forward is megatron-core's "mlp".
        block = self.feed_forward(self.model.intermediate_size / self.layout.tp, recomputed="mlp" in self.recompute)
        norm = 0.0 if self.fp8 or "norm" in self.recompute else self.message
        return self._layer(_Bytes(attention.kept + block.kept + norm, attention.owed + block.owed), copies=2)

    def moe(self) -> _Bytes:
        """A MoE layer."""
        model, attention, r = self.model, self.attention(), self.r
        width = model.moe_intermediate_size / self.layout.expert_tp
        cached = self.fp8 is not None and self.fp8.swiglu_cache == "e4m3"
        kept = r * self.d * self.linear
        if cached:
            kept += 2 * r * width * _WITH_SCALES
            owed = (2 * r * self.d + 4 * r * width) * _WITH_SCALES
        else:
            kept += 2 * r * width * self.size
            kept += 0.0 if "moe_act" in self.recompute else r * width * self.linear
            owed = (2 * r * self.d + 3 * r * width) * self.linear
        shared_width = model.n_shared_experts * model.moe_intermediate_size / self.layout.tp
        shared = self.feed_forward(shared_width, recomputed="shared_experts" in self.recompute)
        kept += self.t * model.n_routed_experts * 13  # three float32 and a mask by token and expert
        norm = 0.0 if "norm" in self.recompute else self.message
        kept, owed = attention.kept + kept + shared.kept + norm, attention.owed + owed + shared.owed
        return self._layer(_Bytes(kept, owed), copies=2 + self.planned)

    def _layer(self, inside: _Bytes, *, copies: int) -> _Bytes:
        """Add the residual sums, ``copies`` of T x D; under full recomputation a layer keeps its input alone."""
        if "full" in self.recompute:
            return _Bytes(self.message, inside.owed)
        return _Bytes(inside.kept + copies * self.message, inside.owed)

    def prediction(self) -> float:
        """Return what final norm, head and loss of one prediction keep: float32 probabilities, normed states."""
        return self.g * self.model.vocab_size / self.layout.tp * 4 + 3 * self.message


def estimate_stages(recipe: Recipe, layout: Layout, layers: tuple[int, ...], schedule: Schedule) -> list[StageMemory]:
    """Return what every stage holds (planning.activations.measure_stages measures it)."""
    kinds = {step.kind for steps in schedule.ranks for step in steps}
    planned, splits = "FB" in kinds, bool(kinds & {"I", "W"})
    sizes = _Sizes(recipe, layout, planned=planned)
    return [_stage(sizes, layers, stage, splits=splits) for stage in range(len(layers))]


def _stage(sizes: _Sizes, layers: tuple[int, ...], stage: int, *, splits: bool) -> StageMemory:
    model, message = sizes.model, sizes.message
    parts = composition(model, layers, stage)
    dense, moe = sizes.dense(), sizes.moe()
    kept = parts.dense * dense.kept + parts.moe * moe.kept + message
    owed = parts.dense * dense.owed + parts.moe * moe.owed
    forward, backward = 2 * message, 4 * message
    if parts.moe:
        forward = _MOMENTARY_FORWARD * sizes.r * sizes.d * sizes.size
        backward = (_MOMENTARY_BACKWARD if sizes.planned else 4.5) * sizes.r * sizes.d * sizes.size
    if parts.predictions:
        logits = sizes.g * model.vocab_size / sizes.layout.tp
        kept += parts.predictions * sizes.prediction()
        forward = max(forward, logits * (sizes.size + 4))
        if sizes.planned:  # beside another forward; alone, probabilities are let go as their gradients come
            backward = max(backward, logits * (sizes.size + 8))
        kept += model.num_nextn_predict_layers * (2 * sizes.t * sizes.d * sizes.linear + message)
    parameters, experts, in_fp8 = stage_parameters(sizes.recipe, sizes.layout, layers, stage)
    largest = 2 * model.moe_intermediate_size * sizes.d * model.n_routed_experts / sizes.layout.ep if parts.moe else 0
    return StageMemory(
        parameters=parameters,
        expert_parameters=experts,
        fp8_parameters=in_fp8,
        kept=round(kept),
        held=0,
        kept_owed=round(owed) if splits else 0,
        peak_forward=round(kept + forward),
        peak_backward=round(kept + backward),
        peak_weight_grad=round(owed + 4 * largest) if splits else 0,
        message=round(message),
    )


def stage_parameters(recipe: Recipe, layout: Layout, layers: tuple[int, ...], stage: int) -> tuple[int, int, int]:
    """Return (all, those of routed experts, those of layers in FP8) parameters of a stage on one rank, exactly."""
    model, tp = recipe.model, layout.tp
    d, parts = model.hidden_size, composition(model, layers, stage)
    whole = {  # on every TP rank: norms, latents' projections
        "down": d * ((model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim),
        "norm": 2 * d + (model.q_lora_rank or 0) + model.kv_lora_rank,
    }
    split = attention_parameters(model) - whole["down"] - (model.q_lora_rank or 0) - model.kv_lora_rank
    attention = whole["down"] + split // tp
    layer_count = parts.dense + parts.moe
    dense = 3 * d * model.intermediate_size // tp
    shared = 3 * d * model.moe_intermediate_size * model.n_shared_experts // tp
    gate = model.n_routed_experts * d
    per_rank = model.n_routed_experts // layout.ep
    experts = parts.moe * per_rank * 3 * d * model.moe_intermediate_size // layout.expert_tp
    linear = layer_count * attention + parts.dense * dense + parts.moe * shared + experts
    linear += parts.mtp * 2 * d * d // tp
    other = layer_count * whole["norm"] + parts.moe * gate + parts.mtp * 3 * d
    other += parts.embeddings * model.vocab_size * d // tp
    if parts.predictions:
        other += model.vocab_size * d // tp + d
    fp8 = recipe.precision.fp8
    return linear + other, experts, linear if fp8 is not None else 0
