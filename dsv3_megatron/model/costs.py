"""Exact parameters and floating-point operations of a model, from its settings alone: no tensor is made.

Checked against the modules themselves by tests. Conventions: a product of [m, k] and [k, n] is 2mkn operations; the
backward of a product costs twice its forward. Sources: arXiv 2412.19437 section 4.2; arXiv 2505.09343 tables 2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_megatron.model.composition import Composition, composition
from dsv3_megatron.model.freeze import MTP, layer_parts
from dsv3_megatron.model.settings import ModelSettings

LOGITS_AT_ONCE = 1 << 24  # of attention, in float32, where the largest are looked for
_LOGIT_ROWS = 512  # queries: so many that reading the keys again for each block costs little beside the logits


@dataclass(frozen=True)
class Parameters:
    """Parameters by kind. Router biases are buffers, not parameters. ``frozen``: of main and MTP, those not trained."""

    embedding: int
    head: int
    attention: int
    dense_layer: int
    moe_layer: int
    routed_expert: int
    gate: int
    main: int
    mtp: int
    activated_per_token: int
    frozen: int = 0

    @property
    def trained(self) -> int:
        """Of main and MTP, those that are trained."""
        return self.main + self.mtp - self.frozen


def attention_parameters(model: ModelSettings) -> int:
    """Return the parameters of one MLA block, its two latent norms included."""
    d, heads = model.hidden_size, model.num_attention_heads
    query_width = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    if model.q_lora_rank is None:
        query = d * query_width
    else:
        query = d * model.q_lora_rank + model.q_lora_rank + model.q_lora_rank * query_width
    key_value = d * (model.kv_lora_rank + model.qk_rope_head_dim) + model.kv_lora_rank
    key_value += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + key_value + heads * model.v_head_dim * d


def count_parameters(model: ModelSettings) -> Parameters:
    """Return the exact parameters of the model.

    ``main`` is the model without MTP; ``mtp`` what the MTP modules add (embedding and head are shared);
    ``activated_per_token`` multiplies the head and looks the embedding up, the published 36.6B convention.
    """
    d = model.hidden_size
    attention, norms = attention_parameters(model), 2 * d
    dense = 3 * d * model.intermediate_size
    expert = 3 * d * model.moe_intermediate_size
    gate = model.n_routed_experts * d
    moe_layer = attention + norms + gate + (model.n_routed_experts + model.n_shared_experts) * expert
    dense_layer = attention + norms + dense
    embedding = model.vocab_size * d
    dense_layers = model.first_k_dense_replace
    main = 2 * embedding + d + dense_layers * dense_layer + model.num_moe_layers * moe_layer
    block = moe_layer if model.num_moe_layers else dense_layer
    mtp = model.num_nextn_predict_layers * (block + 2 * d * d + 3 * d)
    idle = model.n_routed_experts - model.num_experts_per_tok
    activated = main - embedding - model.num_moe_layers * idle * expert
    frozen = sum(frozen_by_part(model, part_sizes(model)).values())
    return Parameters(
        embedding, embedding, attention, dense_layer, moe_layer, expert, gate, main, mtp, activated, frozen
    )


def part_sizes(model: ModelSettings, *, tp: int = 1, ep: int = 1, expert_tp: int = 1) -> dict[str, int]:
    """Return the parameters that one rank holds of every part: of those inside layers in one layer, "final norm" and
    "joint norms" (of an MTP module) apart from the gains inside layers, which are "norms"."""
    d, latents = model.hidden_size, (model.q_lora_rank or 0) + model.kv_lora_rank
    down = d * (latents + model.qk_rope_head_dim)  # on every TP rank whole
    expert = 3 * d * model.moe_intermediate_size
    return {
        "embedding": model.vocab_size * d // tp,
        "head": model.vocab_size * d // tp,
        "attention": down + (attention_parameters(model) - down - latents) // tp,
        "norms": 2 * d + latents,
        "dense": 3 * d * model.intermediate_size // tp,
        "router": model.n_routed_experts * d,
        "experts": model.n_routed_experts // ep * expert // expert_tp,
        "shared_experts": model.n_shared_experts * expert // tp,
        "final norm": d,
        "joint norms": 3 * d,
        MTP: 2 * d * d // tp,
    }


def frozen_by_part(model: ModelSettings, sizes: dict[str, int], has: Composition | None = None) -> dict[str, int]:
    """Return how many parameters of each part are not trained.

    Args:
        sizes: of every part (:func:`part_sizes`, or what of it counts).
        has: of what is asked about; None = the whole model.
    """
    freeze, has = model.freeze, has or composition(model, (model.num_hidden_layers,), 0)
    heads = min(has.predictions, 1)
    found = dict.fromkeys(sizes, 0)
    for moe, count, whole in ((False, has.dense, has.frozen_dense), (True, has.moe, has.frozen_moe)):
        for part in layer_parts(model, moe=moe):
            found[part] += sizes[part] * (count if part in freeze else whole)
    ends = {"embedding": has.embeddings, "head": heads}
    found |= {part: sizes[part] * count for part, count in ends.items() if part in freeze}
    if "norms" in freeze:
        found["final norm"] = sizes["final norm"] * heads
    if MTP in freeze:
        found[MTP] = sizes[MTP] * has.mtp
    if MTP in freeze or "norms" in freeze:
        found["joint norms"] = sizes["joint norms"] * has.mtp
    return found


@dataclass(frozen=True)
class Multiplied:
    """Matrix parameters that one token multiplies, in one layer (a MoE layer where there are any), the head, an MTP
    module without its share of the head."""

    layer: int
    head: int
    mtp_module: int


def multiplied_parameters(model: ModelSettings, sequence_length: int = 0) -> Multiplied:
    """Return what balances stages: the parameters that one token is multiplied with.

    With a sequence length a layer's attention core counts too, as parameters that would be as much work: half the
    sequence lies before a token, and each earlier token costs it a head width of query and value.
    """
    d = model.hidden_size
    active = (model.num_experts_per_tok + model.n_shared_experts) * 3 * d * model.moe_intermediate_size
    feed_forward = active + model.n_routed_experts * d if model.num_moe_layers else 3 * d * model.intermediate_size
    layer = attention_parameters(model) + feed_forward + attention_core(model, sequence_length)
    return Multiplied(layer, model.vocab_size * d, layer + 2 * d * d)


def attention_core(model: ModelSettings, sequence_length: int) -> int:
    """Return the parameters that would be as much work for a token as attention over the tokens before it."""
    width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return model.num_attention_heads * width * sequence_length // 2


def stage_costs(model: ModelSettings, layers_of_stages: Sequence[int], sequence_length: int = 0) -> tuple[float, ...]:
    """Return what each stage costs, in multiples of the mean: the parameters a token is multiplied with there."""
    per = multiplied_parameters(model, sequence_length)
    d = model.hidden_size
    dense = attention_parameters(model) + 3 * d * model.intermediate_size + attention_core(model, sequence_length)
    costs, first = [], 0
    for layers in layers_of_stages:
        of_dense = max(0, min(first + layers, model.first_k_dense_replace) - first)
        costs.append(of_dense * dense + (layers - of_dense) * per.layer)
        first += layers
    costs[-1] += per.head + model.num_nextn_predict_layers * (per.mtp_module + per.head)
    mean = sum(costs) / len(costs)
    return tuple(cost / mean for cost in costs)


def logit_block(length: int, heads: int, at_once: int = LOGITS_AT_ONCE) -> tuple[int, int]:
    """Return (queries, heads) of a block of attention logits in which the largest are looked for, over all keys of a
    sequence of ``length``: no more than ``at_once`` of them, but for one query of one head."""
    rows = max(1, min(length, _LOGIT_ROWS, at_once // length))
    return rows, max(1, min(heads, at_once // (rows * length)))


def training_flops_per_token(model: ModelSettings, sequence_length: int, *, causal: bool = True) -> float:
    """Return floating-point operations of forward and backward per token, MTP included.

    Six per parameter a token is multiplied with, four where that is frozen and has no gradient, plus attention's two
    products over the sequence; ``causal`` counts only the pairs at or below the diagonal (half of them), the convention
    of the 385 TFLOP/s in arXiv 2505.09343. Not counted: recomputed operations, and logits that QK-clip looks at beside
    attention.
    """
    counted = count_parameters(model)
    depths = model.num_nextn_predict_layers
    per_module = multiplied_parameters(model)
    multiplied = counted.activated_per_token + depths * (per_module.mtp_module + per_module.head)
    head_width = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    pairs = sequence_length / 2 if causal else sequence_length
    attention = 2 * (model.num_hidden_layers + depths) * model.num_attention_heads * head_width * pairs
    return 6 * multiplied - 2 * _frozen_multiplied(model) + 3 * attention


def _frozen_multiplied(model: ModelSettings) -> float:
    """Return the frozen parameters, of matrices, that one token is multiplied with, MTP included."""
    if not model.freeze:
        return 0
    active = part_sizes(model) | {"embedding": 0, "norms": 0, "final norm": 0, "joint norms": 0}
    active["experts"] = active["experts"] * model.num_experts_per_tok // model.n_routed_experts
    active["head"] *= 1 + model.num_nextn_predict_layers
    return sum(frozen_by_part(model, active).values())
