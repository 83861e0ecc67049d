"""What the parts of a stage hold, by formula: attention, feed-forward, experts, and what stands at the model's ends.

No torch. The formulae know the torch backend's modules as a GPU's kernels keep them.

Legend: T tokens of a microbatch on this rank, G tokens where TP ranks share widths, R rows of this rank's experts, D
hidden size, X and dY the input and the output's gradient of a linear layer. Their product, the weight gradient, is
added to the gradient buffer as it is computed: it is no tensor of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.model.costs import logit_block
from dsv3_megatron.model.freeze import MTP, trained_parts
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

_WITH_SCALES = 1 + 4 / 128  # bytes of a number in FP8: a float32 scale for 128 of them


@dataclass(frozen=True)
class Part:
    """Bytes of one part of a stage.

    Attributes:
        kept: from its forward to its backward.
        deferred: X and dY of its layers, from its backward to its weight gradients.
        gradients: the dY among them.
        forward: besides what it keeps, inside a forward.
        backward: besides what it kept, inside a backward.
        rows: one copy of the rows of this rank's experts; 0 where there are none.
    """

    kept: float = 0.0
    deferred: float = 0.0
    gradients: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    rows: float = 0.0


class Parts:
    """The parts of a recipe's model on a layout.

    Args:
        planned: passes run through megatron-core's overlapped plan.
        splits: weight gradients are computed apart.
    """

    def __init__(self, recipe: Recipe, layout: Layout, *, planned: bool, splits: bool):
        self.recipe, self.layout, self.model = recipe, layout, recipe.model
        self.planned, self.splits = planned, splits
        self.t = recipe.optim.micro_batch * recipe.data.sequence_length / (layout.cp * layout.tp)
        self.g = self.t * layout.tp
        self.r = self.t * self.model.num_experts_per_tok * layout.expert_tp
        self.d = self.model.hidden_size
        self.size = 2 if recipe.precision.parameters == "bf16" else 4
        self.fp8 = recipe.precision.fp8
        self.cached = recipe.precision.caches_swiglu
        self.recompute = set(recipe.parallel.recompute)
        if "full" in self.recompute:
            self.recompute = {"full"}
        self.message = self.t * self.d * self.size
        self.linear = _WITH_SCALES if self.fp8 else self.size  # bytes of a number that a linear layer keeps
        # A layer that splits in high precision keeps the X that it gathered over TP, others what was given to them.
        self.gathers = splits and not self.fp8 and layout.tp > 1
        self.copied = self.linear if self.fp8 else 0  # of dY, which in high precision is kept itself

    def layer(self, *, moe: bool, frozen: bool = False) -> list[Part]:
        """Return a decoder layer: attention, with the layer's norms and residual sums, and what follows it.

        ``frozen``: as a whole. A frozen matrix keeps no X, and defers nothing.
        """
        trains = trained_parts(self.model.freeze, frozen=frozen)
        attention = self._attention(moe=moe, trains=trains["attention"], waits=moe and trains["shared_experts"])
        block = self._experts(trains) if moe else self._dense(trains["dense"])
        if "full" not in self.recompute:
            return [attention, block]
        return [Part(), self._again(attention, block)]

    def _attention(self, *, moe: bool, trains: bool, waits: bool) -> Part:
        """``waits``: the shared experts, which a plan runs with attention, defer weight gradients."""
        model, g, t, d, message = self.model, self.g, self.t, self.d, self.message
        heads = model.num_attention_heads / self.layout.tp
        qk, v, rank = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim, model.q_lora_rank or 0
        latents, down = rank + model.kv_lora_rank, rank + model.kv_lora_rank + model.qk_rope_head_dim
        ups = (qk if rank else 0) + model.qk_nope_head_dim + v  # what the up-projections give a head
        out, operands = g * heads * v * self.size, g * heads * (2 * qk + v) * self.size
        kept = self._output(heads, trains=trains) + t * down * self.size + self._residuals(moe=moe)
        if "norm" not in self.recompute and trains:  # in FP8 each of the two down-projections keeps a copy of its own
            kept += t * d * (2 * self.linear if self.fp8 else self.size)
        kept += t * latents * self.size if "mla_up" in self.recompute else operands + g * latents * self.linear * trains
        inputs = (2 if self.fp8 else 1) * t * d + g * latents
        gradients = (g * heads * ups + g * d + t * down) * self.linear
        # Queries, keys and values are joined from what the up-projections gave.
        forward = g * heads * (ups + model.qk_rope_head_dim) * self.size - out
        # Their gradients, beside the output's and those of the residual stream; what is recomputed is there twice, as
        # it was made again and where it had been discarded.
        backward = operands + out + 2 * message
        forward = max(forward, self._logits() - out)  # beside queries, keys and values, before there is an output
        if "mla_up" in self.recompute:
            forward, backward = forward + operands, backward + 2 * operands
            if self.layout.cp > 1:  # also as it was exchanged for whole sequences; and one gradient on its way back
                backward += 2 * operands + g * heads * qk * self.size
        backward += 2 * message if "norm" in self.recompute else 0
        if "attention" in self.recompute:
            backward = max(backward + out, self._logits() + message)
        backward = max(backward, out + message)
        deferred = inputs * self.linear + self._output(heads, trains=True) + gradients if trains else 0.0
        if (
            self.planned and not self.fp8 and (trains or waits)
        ):  # a plan lets go of what its nodes handed on with what they defer
            deferred += 2 * message
        return Part(kept, deferred, gradients * trains, forward, backward)

    def _logits(self) -> float:
        """Return the block of float32 logits in which QK-clip looks for the largest."""
        if self.recipe.optim.qk_clip is None:
            return 0.0
        length, heads = self.recipe.data.sequence_length, self.model.num_attention_heads // self.layout.tp
        rows, together = logit_block(length, heads // self.layout.cp)
        return 4.0 * rows * together * length

    def _output(self, heads: float, *, trains: bool) -> float:
        """Return what attention and the layer after it keep of the output, and attention of its rows' sums."""
        numbers = self.g * heads * self.model.v_head_dim
        cache = self.fp8.attention_output_cache if self.fp8 else None
        if "attention" in self.recompute:
            return numbers * self.linear * trains
        kept = numbers * (1.5 + 4 / 128 if cache == "e5m6" else self.size) + self.g * heads * 4
        return kept + (numbers * _WITH_SCALES * trains if cache == "high" else 0)  # the layer's own copy

    def _residuals(self, *, moe: bool) -> float:
        """Return what is kept of the residual stream, and of the norm before what follows attention."""
        copies = 2 + (1 if moe and self.planned else 0)
        normed = moe or "mlp" in self.recompute or not (self.fp8 or self.gathers)
        if "norm" not in self.recompute and normed:
            copies += 1
        return copies * self.message

    def _dense(self, trains: bool) -> Part:
        width = self.model.intermediate_size / self.layout.tp
        return self._feed_forward(width, recomputed="mlp" in self.recompute, trains=trains)

    def _feed_forward(self, width: float, *, recomputed: bool, trains: bool) -> Part:
        """SwiGLU with its two layers, outside the routed experts."""
        g, d, numbers = self.g, self.d, self.g * width
        # SwiGLU keeps its input, the second layer its own unless it can take it from SwiGLU's cache.
        inner = 2 * numbers * _WITH_SCALES if self.cached else numbers * (2 * self.size + self.linear * trains)
        x = g * d * self.linear
        comes_again = "norm" in self.recompute and self.layout.tp == 1
        kept = inner + (x if trains and ((self.fp8 and not comes_again) or self.gathers) else 0)
        gradients = (2 * numbers + g * d) * self.linear
        deferred = x + gradients + (inner if self.cached else numbers * self.linear) if trains else 0.0
        forward = numbers * (3 if self.cached else 1) * self.size
        backward = 2 * numbers * (self.size + self.copied) + 2 * self.message
        part = Part(kept, deferred, gradients * trains, forward, backward)
        return self._again(part) if recomputed else part

    def _experts(self, trains: dict[str, bool]) -> Part:
        """A MoE layer behind its norm: routed experts with their exchanges, router and shared experts."""
        model, r, d = self.model, self.r, self.d
        width, rows = model.moe_intermediate_size / self.layout.expert_tp, self.r * self.d * self.size
        inner = 2 * r * width * (_WITH_SCALES if self.cached else self.size)
        mine = trains["experts"]
        activated = 0.0 if self.cached else r * width * self.linear * mine
        shared_width = model.n_shared_experts * model.moe_intermediate_size / self.layout.tp
        shared = self._feed_forward(
            shared_width, recomputed="shared_experts" in self.recompute, trains=trains["shared_experts"]
        )
        made_again = activated if "moe_act" in self.recompute else 0.0
        kept = r * d * self.linear * mine + inner + activated - made_again + shared.kept
        kept += self.t * model.n_routed_experts * 13  # three float32 and a mask by token and expert
        gradients = (r * d + 2 * r * width) * self.linear
        deferred = r * d * self.linear + (inner if self.cached else activated) + gradients if mine else 0.0
        deferred += shared.deferred
        if self.planned and not self.fp8 and mine:
            deferred += rows
        if self.planned:  # on both sides of the exchange and of the products; SwiGLU's input is let go or deferred
            beside = gradients + made_again - (0.0 if self.cached else inner)
            backward = 4 * rows + beside + 2 * self.message + self._normed_again()
        else:
            products = rows + 2 * r * width * (self.size + self.copied)  # dX and dY of the first layer
            backward = max(self._sorting(rows, gradients), products + self._normed_again())
        part = Part(kept, deferred, gradients * mine, self._exchanged(rows, x_is_kept=mine), backward, rows)
        return self._again(part) if "moe" in self.recompute else part

    @property
    def _exchanges(self) -> bool:
        return self.layout.ep * self.layout.expert_tp > 1

    def _exchanged(self, rows: float, *, x_is_kept: bool) -> float:
        """Return what a forward holds of rows: as they are sent, received, sorted, given by the experts, sorted back.

        In high precision the experts' input is kept anyway, unless they are frozen; a plan frees what it sent.
        """
        copies = (5 if self._exchanges else 2) - (1 if self.planned else 0) - (1 if x_is_kept and not self.fp8 else 0)
        normed = self.message if "norm" in self.recompute else 0.0
        return copies * rows + normed - (self.message if self.planned else 0)

    def _sorting(self, rows: float, gradients: float) -> float:
        """Return what a backward holds of the rows' gradients: received, sorted into zeros, beside deferred dY."""
        copies = 3 if self._exchanges else 2
        return copies * rows + self._normed_again() + (gradients if self.splits else 0)

    def _normed_again(self) -> float:
        """Return the output's gradient, and what is normed again: there twice, as in attention."""
        return self.message * (3 if "norm" in self.recompute else 1)

    def _again(self, *parts: Part) -> Part:
        """Return parts that are run again, as one, in their backward: all they keep is alive there once more.

        A whole layer keeps its input, which is the residual stream besides; a norm's output, where that is the input,
        is counted with the norm.
        """
        whole_layer, rows = len(parts) > 1, parts[-1].rows
        inside = sum(part.kept for part in parts)
        forward = max(part.forward for part in parts)
        unkept = 0.0 if self.fp8 else rows  # the experts' input is theirs to keep in the second run only
        with_x = 0.0 if self.fp8 else self.message  # the input's gradient stays with it, where it is X itself
        peak = max(forward, *(part.backward for part in parts))
        return Part(
            kept=self.message if whole_layer else 0.0,
            deferred=sum(part.deferred for part in parts) + with_x,
            gradients=sum(part.gradients for part in parts),
            forward=forward + unkept + (2 * self.message if whole_layer else 0.0),
            backward=inside + peak + 2 * self.message,
            rows=rows,
        )

    # -- the ends of the model -----------------------------------------------------------------------------------------

    def embedding(self, uses: int = 1) -> Part:
        """The lookup on the first stage. Rows of a BF16 table's gradient are added to the buffer in float32; that of a
        float32 table is as large as the table, and those of several ``uses`` are added."""
        table = self.model.vocab_size * self.d / self.layout.tp * self.size
        gradient = 2 * self.message if self.size == 2 else (2 * uses - 1) * table
        return Part(self.message, backward=gradient + 2 * self.message)

    def received(self) -> Part:
        """The message that a later stage begins with."""
        # In high precision every X deferred is a tensor of the graph, at whose end are input and gradient.
        held = not self.planned and not self.fp8
        return Part(self.message, deferred=2 * self.message if held else 0.0)

    def joint(self) -> Part:
        """What precedes the layer of an MTP module: lookup, two norms, projection of both to one, gathered over TP."""
        trains, gathered = MTP not in self.model.freeze, self.g * self.d * self.size
        x = 2 * self.g * self.d * self.linear * trains
        deferred = x + self.t * self.d * self.linear * trains
        # Run again as a whole, the module keeps lookup and hidden states, and its layer nothing.
        kept = self.message if "full" in self.recompute else x + 2 * self.message + gathered
        return Part(kept, deferred, deferred - x, backward=self.embedding().backward)

    def heads(self, predictions: int) -> Part:
        """Final norm, output head and loss of all predictions, which keep float32 probabilities and normed states."""
        model, tp = self.model, self.layout.tp
        logits = self.g * model.vocab_size / tp
        kept = predictions * (logits * 4 + (0 if "head" in self.model.freeze else self.message))
        return Part(kept, forward=min(predictions, 2) * logits * self.size, backward=logits * self.size)
