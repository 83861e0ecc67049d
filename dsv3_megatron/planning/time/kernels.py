"""The kernels of every part of the model, pass by pass: what runs, on which sizes, and how long it takes on a device.

A part is a dense layer, a MoE layer, the embedding, the head with its loss, or what joins an MTP module. Passes are
those of the schedule: F forward, I input gradient (recomputation included), W weight gradient, of which a frozen
matrix has none.

Legend: T tokens of a microbatch on this rank, R rows that the experts of this rank get, D hidden size.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from dsv3_megatron.model.costs import logit_block
from dsv3_megatron.model.freeze import MTP, trained_parts
from dsv3_megatron.planning.time.expert_exchange import ranks_reached
from dsv3_megatron.planning.time.roofline import Device, Format
from dsv3_megatron.planning.time.traffic import widths_over_context
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

Pass = str  # F, I or W
Kind = str  # what a kernel does, for tables


@dataclass
class PartTimes:
    """Seconds of one part of the model, by pass and kind of kernel."""

    passes: dict[Pass, Counter[Kind]] = field(default_factory=lambda: {p: Counter() for p in "FIW"})

    def add(self, which: Pass, kind: Kind, seconds: float) -> None:
        """Count a kernel."""
        self.passes[which][kind] += seconds  # type: ignore[assignment]  # a Counter, of seconds

    def total(self, which: Pass) -> float:
        """Return the seconds of a pass."""
        return sum(self.passes[which].values())

    def __add__(self, other: PartTimes) -> PartTimes:
        return PartTimes({p: self.passes[p] + other.passes[p] for p in "FIW"})

    def __mul__(self, times: float) -> PartTimes:
        return PartTimes({p: Counter({k: v * times for k, v in c.items()}) for p, c in self.passes.items()})


@dataclass(frozen=True)
class _Linear:
    """A linear layer as a rank sees it: [rows, width_in] x [width_in, width_out], ``groups`` of them as one kernel."""

    name: str
    rows: float
    width_in: int
    width_out: int
    groups: int = 1
    trains: bool = True


class Kernels:
    """Prices the parts of a recipe's model on one rank of a layout."""

    def __init__(self, recipe: Recipe, layout: Layout, device: Device):
        self.recipe, self.layout, self.device, self.model = recipe, layout, device, recipe.model
        self.sequences = recipe.optim.micro_batch
        self.tokens = self.sequences * recipe.data.sequence_length / (layout.cp * layout.tp)  # sequence-sharded over TP
        self.gathered = self.tokens * layout.tp  # where TP ranks share the widths instead
        self.rows = self.tokens * self.model.num_experts_per_tok * layout.expert_tp
        self.high: Format = "bf16" if recipe.precision.parameters == "bf16" else "fp32"
        self.fp8 = recipe.precision.fp8 is not None
        self.cached = recipe.precision.caches_swiglu
        self.form: Format = "fp8" if self.fp8 else self.high
        self.size = 2 if self.high == "bf16" else 4
        self.recompute = set(recipe.parallel.recompute)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def layer(self, *, moe: bool, frozen: bool = False) -> PartTimes:
        """Return a decoder layer without its exchanges; ``frozen``: as a whole."""
        times = PartTimes()
        trains = trained_parts(self.model.freeze, frozen=frozen)
        self._attention(times, trains=trains["attention"])
        if moe:
            self._experts(times, trains)
        else:
            self._feed_forward(times, self.model.intermediate_size, "mlp", trains=trains["dense"])
        # Two norms and two residual sums, each of which reads two and writes one.
        self._norms(times, 2 * self.tokens * self.model.hidden_size)
        residual = self.device.memory(6 * self.tokens * self.model.hidden_size * self.size)
        times.add("F", "residual", residual)
        times.add("I", "residual", residual)
        if "full" in self.recompute:
            self._again(times, "F")
        return times

    def embedding(self) -> PartTimes:
        """Return the lookup and its gradient."""
        times = PartTimes()
        nbytes = self.gathered * self.model.hidden_size * self.size
        times.add("F", "embedding", self.device.memory(2 * nbytes))
        if "embedding" not in self.model.freeze:
            times.add("I", "embedding", self.device.memory(3 * nbytes))
        return times

    def head(self) -> PartTimes:
        """Return final norm, output head and loss of one prediction."""
        times, model = PartTimes(), self.model
        words = model.vocab_size // self.layout.tp
        product = self.device.product(self.gathered, words, model.hidden_size, self.high)
        times.add("F", "head", product)
        # The head is no splittable layer: both gradients belong to the backward of the last stage.
        times.add("I", "head", product if "head" in model.freeze else 2 * product)
        logits = self.gathered * words
        # Forward: read BF16, write and read float32 twice (maximum, exponentials). Backward: read float32, write BF16.
        times.add("F", "loss", self.device.memory(logits * (2 + 4 * 4)))
        times.add("I", "loss", self.device.memory(logits * (4 + 2)))
        self._norms(times, self.tokens * model.hidden_size)
        return times

    def mtp_joint(self) -> PartTimes:
        """Return what an MTP module has besides its layer and its head: two norms and the projection."""
        times, model = PartTimes(), self.model
        width, trains = model.hidden_size, MTP not in model.freeze
        self._linear(times, _Linear("mtp", self.gathered, 2 * width, width // self.layout.tp, trains=trains))
        self._norms(times, 2 * self.tokens * model.hidden_size)
        return times

    # -- inside a layer ------------------------------------------------------------------------------------------------

    def _attention(self, times: PartTimes, *, trains: bool) -> None:
        model, device, tp = self.model, self.device, self.layout.tp
        heads = model.num_attention_heads // tp
        qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
        up, down = [], []
        if model.q_lora_rank is None:
            down.append(_Linear("attention", self.gathered, model.hidden_size, heads * qk))
        else:
            down.append(_Linear("attention", self.tokens, model.hidden_size, model.q_lora_rank))
            up.append(_Linear("attention", self.gathered, model.q_lora_rank, heads * qk))
        down.append(_Linear("attention", self.tokens, model.hidden_size, model.kv_lora_rank + model.qk_rope_head_dim))
        up.append(_Linear("attention", self.gathered, model.kv_lora_rank, heads * (model.qk_nope_head_dim + v)))
        out = _Linear("attention", self.gathered, heads * v, model.hidden_size)
        for linear in (*down, *up, out):
            self._linear(times, replace(linear, trains=trains))
        # RoPE and joining: read and write every query and key once.
        rope = device.memory(self.gathered * heads * (2 * qk) * 2 * self.size)
        times.add("F", "rope", rope)
        times.add("I", "rope", rope)
        self._norms(times, self.tokens * sum(x.width_in for x in up))
        if "mla_up" in self.recompute:
            for linear in up:
                self._forward(times, linear, "I")
            times.add("I", "rope", rope)
        if self.layout.cp > 1:  # each exchange sorts by rank or head before, and by place after
            for which, width in zip("FI", widths_over_context(self.recipe)):
                times.add(which, "exchanges over CP", device.memory(self.gathered * heads * width * 4 * self.size))
        # Below the diagonal only; under CP a rank has all of them for its share of the heads.
        pairs = self.sequences * self.recipe.data.sequence_length**2 / 2 / self.layout.cp
        pairs *= heads
        core = device.attention(pairs, 2 * (qk + v))
        times.add("F", "attention core", core)
        times.add("I", "attention core", device.attention_backward(pairs, 2 * (3 * qk + 2 * v)))
        logits = self._largest_logits(pairs, qk)
        times.add("F", "largest logits", logits)
        if "attention" in self.recompute:
            times.add("I", "attention core", core)
            times.add("I", "largest logits", logits)

    def _largest_logits(self, pairs: float, width: int) -> float:
        """Return the seconds in which QK-clip finds the largest of ``pairs`` of query and key, block by block: their
        products, which are written and read in float32."""
        if self.recipe.optim.qk_clip is None:
            return 0.0
        length, once = self.recipe.data.sequence_length, self.device.memory(4 * pairs)
        rows, _ = logit_block(length, self.model.num_attention_heads // self.layout.tp // self.layout.cp)
        blocks = math.ceil(pairs / (rows * length / 2))
        return max(self.device.product(rows, length / 2, width, self.high, groups=blocks), once) + once

    def _feed_forward(self, times: PartTimes, width: int, recomputed_by: str, *, trains: bool) -> None:
        """SwiGLU with its two layers, for a dense layer or the shared experts."""
        width //= self.layout.tp
        first = _Linear("feed-forward", self.gathered, self.model.hidden_size, 2 * width, trains=trains)
        second = _Linear("feed-forward", self.gathered, width, self.model.hidden_size, trains=trains)
        self._linear(times, first)
        self._linear(times, second)
        activation = self._swiglu(times, self.gathered * width)
        if recomputed_by in self.recompute:
            self._forward(times, first, "I")
            self._forward(times, second, "I")
            times.add("I", "swiglu", activation)

    def _experts(self, times: PartTimes, trains: dict[str, bool]) -> None:
        model, layout = self.model, self.layout
        if model.n_shared_experts:
            shared = model.n_shared_experts * model.moe_intermediate_size
            self._feed_forward(times, shared, "shared_experts", trains=trains["shared_experts"])
        gate = self.device.product(self.tokens, model.n_routed_experts, model.hidden_size, self.high)
        times.add("F", "gate", gate)
        times.add("I", "gate", 2 * gate if trains["router"] else gate)
        local, width = model.n_routed_experts // layout.ep, model.moe_intermediate_size // layout.expert_tp
        first = _Linear("experts", self.rows / local, model.hidden_size, 2 * width, local, trains["experts"])
        second = _Linear("experts", self.rows / local, width, model.hidden_size, local, trains["experts"])
        self._linear(times, first)
        self._linear(times, second)
        activation = self._swiglu(times, self.rows * width)
        self._sort(times)
        if ("moe_act" in self.recompute and not self.cached) or "moe" in self.recompute:
            times.add("I", "swiglu", activation)
        if "moe" in self.recompute:
            self._forward(times, first, "I")
            self._forward(times, second, "I")

    def _swiglu(self, times: PartTimes, outputs: float) -> float:
        """Count SwiGLU of ``outputs`` numbers; return its forward's seconds."""
        forward = self.device.memory(outputs * 3 * self.size)  # reads two, writes one
        backward = self.device.memory(outputs * 5 * self.size)  # reads three, writes two
        if self.cached:  # its input is kept in FP8, and its output made once more on the way
            forward += self.device.memory(outputs * 2)
            backward = self.device.memory(outputs * (2 + 4 * self.size))
        times.add("F", "swiglu", forward)
        times.add("I", "swiglu", backward)
        return forward

    def _sort(self, times: PartTimes) -> None:
        """Count sorting received tokens by expert, one copy for each, and bringing them together again afterwards.

        A token that two experts of this rank want comes once. Backward does the same, the other way round.
        """
        model = self.model
        received = (
            self.tokens
            * self.layout.expert_tp
            * ranks_reached(
                self.layout.ep, model.n_routed_experts, model.n_group, model.topk_group, model.num_experts_per_tok
            )
        )
        fp8 = self.recipe.precision.fp8 if self.fp8 else None
        moved = (received + self.rows) * self.model.hidden_size
        dispatched = 1 + 4 / 128 if fp8 is not None and fp8.dispatch == "e4m3" else self.size
        seconds = self.device.memory(moved * dispatched) + self.device.memory(moved * self.size)
        times.add("F", "sorting", seconds)
        times.add("I", "sorting", seconds)

    def _norms(self, times: PartTimes, numbers: float) -> None:
        forward = self.device.memory(2 * numbers * self.size)
        times.add("F", "norm", forward)
        times.add("I", "norm", self.device.norm_backward(3 * numbers * self.size))
        if "norm" in self.recompute:
            times.add("I", "norm", forward)

    # -- linear layers -------------------------------------------------------------------------------------------------

    def _linear(self, times: PartTimes, linear: _Linear) -> None:
        """Count the three products of a layer and the casts of their operands."""
        self._forward(times, linear, "F")
        rows, k, n, groups = linear.rows, linear.width_in, linear.width_out, linear.groups
        times.add("I", f"{linear.name} products", self.device.product(rows, k, n, self.form, groups=groups))
        if self.fp8:  # the output's gradient, cut by rows
            times.add("I", "casts", self._cast(groups * rows * n))
        if not linear.trains:
            return
        weight_gradient = self.device.weight_gradient(n, k, rows, self.form, groups=groups)
        times.add("W", f"{linear.name} products", weight_gradient)
        if self.fp8:  # the same by columns
            times.add("I", "casts", self._cast(groups * rows * n))

    def _forward(self, times: PartTimes, linear: _Linear, which: Pass) -> None:
        rows, k, n, groups = linear.rows, linear.width_in, linear.width_out, linear.groups
        times.add(which, f"{linear.name} products", self.device.product(rows, n, k, self.form, groups=groups))
        if self.fp8:
            times.add(which, "casts", self._cast(groups * rows * k))
            if which == "F" and linear.trains:
                times.add(which, "casts", self._cast(groups * rows * k))  # again by columns, for the weight gradient

    def _cast(self, numbers: float) -> float:
        return self.device.cast(numbers * (self.size + 1))

    def _again(self, times: PartTimes, which: Pass) -> None:
        """Count a whole forward once more in the backward."""
        for kind, seconds in list(times.passes[which].items()):
            times.add("I", kind, seconds)
