"""Names, shapes and places between Hugging Face's ``deepseek_v3`` files and our checkpoints, as one table.

Every published tensor is a box inside one tensor of ours: the two halves of a gated layer's first matrix, one expert
of a stack. :func:`published_tensors` lists them all, and import, export and their tests read that list.

Source: the published checkpoint's tensor names (README_WEIGHTS.md of DeepSeek-V3: the MTP module is the layer after the
last); transformers' DeepseekV3ForCausalLM; vLLM's DeepSeek MTP model, whose ``eh_proj`` multiplies [embedding; hidden],
as megatron-core's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_megatron.model.settings import ModelSettings

LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attn.q_proj": "self_attention.linear_q_proj",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "self_attn.o_proj": "self_attention.linear_proj",
}
TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
MTP = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "final_layernorm"}
# What an MTP layer shares with the model, and published files repeat.
COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
QUANTISED = ("self_attn.", "mlp.")  # and a matrix, and not the gate: FP8 in the published files
NEVER_QUANTISED = ("norm.weight", "mlp.gate.")


@dataclass(frozen=True)
class Published:
    """A tensor of the published files, and the box of ours that holds its numbers."""

    name: str
    shape: tuple[int, ...]
    key: str  # of our tensor, as checkpoints name it
    start: tuple[int, ...]  # first index of the box
    extent: tuple[int, ...]  # of the box; as many numbers as ``shape``
    copy_of: str | None = None  # the published tensor that this one repeats

    @property
    def is_float32(self) -> bool:
        """Whether it is float32 in every file: the routers' biases, which an update of 0.001 must move."""
        return self.name.endswith("e_score_correction_bias")

    @property
    def is_quantised(self) -> bool:
        """Whether it is FP8 in a file of FP8 weights: the matrices of attention and feed-forward, not the gate."""
        inside = any(f".{part}" in self.name for part in QUANTISED)
        return inside and len(self.shape) == 2 and not any(part in self.name for part in NEVER_QUANTISED)


def published_tensors(model: ModelSettings) -> list[Published]:
    """Return every tensor of the published files of a model, in their order: embedding, layers, MTP, norm, head."""
    top = dict(_top(model))
    found = [top["model.embed_tokens.weight"]]
    for layer in range(model.num_hidden_layers):
        dense = layer < model.first_k_dense_replace
        found += _layer(model, f"model.layers.{layer}", f"decoder.layers.{layer}", dense)
    for depth in range(model.num_nextn_predict_layers):
        theirs, ours = f"model.layers.{model.num_hidden_layers + depth}", f"mtp.layers.{depth}"
        found += _layer(model, theirs, f"{ours}.transformer_layer", dense=not model.num_moe_layers)
        width = model.hidden_size
        for old, new in MTP.items():
            shape = (width, 2 * width) if old == "eh_proj" else (width,)
            found.append(_whole(f"{theirs}.{old}.weight", shape, f"{ours}.{new}.weight"))
        for old, name in COPIES.items():
            whole = top[name]
            copy = Published(f"{theirs}.{old}.weight", whole.shape, whole.key, whole.start, whole.extent, name)
            found.append(copy)
    return [*found, top["model.norm.weight"], top["lm_head.weight"]]


def our_shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our tensors by key: what the boxes of the table fill without a gap."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in published_tensors(model):
        ends = tuple(s + e for s, e in zip(tensor.start, tensor.extent))
        shapes[tensor.key] = tuple(map(max, ends, shapes.get(tensor.key, ends)))
    return shapes


def _whole(name: str, shape: tuple[int, ...], key: str) -> Published:
    return Published(name, shape, key, (0,) * len(shape), shape)


def _top(model: ModelSettings) -> Iterator[tuple[str, Published]]:
    for name, key in TOP.items():
        shape = (model.hidden_size,) if "norm" in name else (model.vocab_size, model.hidden_size)
        yield name, _whole(name, shape, key)


def _layer(model: ModelSettings, theirs: str, ours: str, dense: bool) -> Iterator[Published]:
    for old, shape in _attention_shapes(model).items():
        yield _whole(f"{theirs}.{old}.weight", shape, f"{ours}.{LAYER[old]}.weight")
    width = model.hidden_size
    if dense:
        yield from _gated_boxes(f"{theirs}.mlp", f"{ours}.mlp", width, model.intermediate_size)
        return
    yield _whole(f"{theirs}.mlp.gate.weight", (model.n_routed_experts, width), f"{ours}.mlp.router.weight")
    if model.topk_method == "noaux_tc" and model.scoring_func == "sigmoid":
        bias = f"{theirs}.mlp.gate.e_score_correction_bias"
        yield _whole(bias, (model.n_routed_experts,), f"{ours}.mlp.router.expert_bias")
    if model.n_shared_experts:
        inner = model.n_shared_experts * model.moe_intermediate_size
        yield from _gated_boxes(f"{theirs}.mlp.shared_experts", f"{ours}.mlp.shared_experts", width, inner)
    for expert in range(model.n_routed_experts):
        place = f"{ours}.mlp.experts.experts"
        yield from _gated_boxes(f"{theirs}.mlp.experts.{expert}", place, width, model.moe_intermediate_size, expert)


def _attention_shapes(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    width, heads = model.hidden_size, model.num_attention_heads
    queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent = model.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    if model.q_lora_rank is None:
        shapes["self_attn.q_proj"] = (queries, width)
    else:
        shapes["self_attn.q_a_proj"] = (model.q_lora_rank, width)
        shapes["self_attn.q_a_layernorm"] = (model.q_lora_rank,)
        shapes["self_attn.q_b_proj"] = (queries, model.q_lora_rank)
    shapes["self_attn.kv_a_proj_with_mqa"] = (latent + model.qk_rope_head_dim, width)
    shapes["self_attn.kv_a_layernorm"] = (latent,)
    shapes["self_attn.kv_b_proj"] = (heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    shapes["self_attn.o_proj"] = (width, heads * model.v_head_dim)
    return shapes


def _gated_boxes(theirs: str, ours: str, width: int, inner: int, expert: int | None = None) -> Iterator[Published]:
    """Yield gate, up and down of a gated layer, whose first two are halves of one matrix of ours."""
    at, one = ((), ()) if expert is None else ((expert,), (1,))
    for row, name in ((0, "gate_proj"), (inner, "up_proj")):
        box = ((*at, row, 0), (*one, inner, width))
        yield Published(f"{theirs}.{name}.weight", (inner, width), f"{ours}.linear_fc1.weight", *box)
    box = ((*at, 0, 0), (*one, width, inner))
    yield Published(f"{theirs}.down_proj.weight", (width, inner), f"{ours}.linear_fc2.weight", *box)


# -- transformers' modules ---------------------------------------------------------------------------------------------


def from_hugging_face(state: dict[str, Tensor], model: ModelSettings) -> dict[str, Tensor]:
    """Return the main model's weights under the names of our modules, from transformers' state dict.

    transformers 5 holds routed experts stacked (``experts.gate_up_proj`` [E, 2I, D], ``experts.down_proj`` [E, D, I]),
    as we do; everything else is as in the published files.
    """
    found: dict[str, Tensor] = {}
    for tensor in published_tensors(model.model_copy(update={"num_nextn_predict_layers": 0})):
        key = tensor.key.replace(".experts.experts.", ".experts.")
        if ".mlp.experts." in tensor.name:
            stack = tensor.name.split(".experts.")[0] + ".experts."
            found[key] = state[stack + ("gate_up_proj" if "linear_fc1" in key else "down_proj")]
        elif tensor.name.endswith("gate_proj.weight"):
            found[key] = torch.cat([state[tensor.name], state[tensor.name.replace("gate_proj", "up_proj")]])
        elif not tensor.name.endswith("up_proj.weight"):
            found[key] = state[tensor.name]
    return found
