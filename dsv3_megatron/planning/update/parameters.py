"""The parameters of a stage, in the order in which its modules hold them: names, whole shapes, where TP cuts. No torch.

Gradient buffers are laid out in this order, and everything that a rank updates follows from it. Tests compare it with
the modules themselves. It is that of the torch backend; Transformer Engine's modules have some vectors elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv3_megatron.checkpoint.boxes import Box
from dsv3_megatron.model.freeze import is_frozen
from dsv3_megatron.model.settings import ModelSettings
from dsv3_megatron.recipe import Recipe
from parallel.layout import Layout

EMBEDDING = "embedding.word_embeddings.weight"
_ROWS, _COLUMNS = -2, -1


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stage.

    Attributes:
        key: its name in checkpoints.
        whole: its shape there: [numbers], [rows, columns] or [experts, rows, columns].
        cut: the axis that tensor parallelism cuts (of experts: expert TP); None: every rank of it holds all.
        halves: two matrices one above the other, gate and up, each of which is cut.
        shared: the first and the last stage, on different ranks, train a copy each: it has a bucket of its own.
    """

    key: str
    whole: tuple[int, ...]
    cut: int | None = None
    halves: bool = False
    shared: bool = False

    @property
    def of_experts(self) -> bool:
        """Whether it is a stack of routed experts."""
        return len(self.whole) == 3

    @property
    def in_fp8(self) -> bool:
        """Whether it may be held in FP8: the matrices of linear layers, without router, embedding and head."""
        outside = self.key == EMBEDDING or self.key.startswith("output_layer.") or ".router." in self.key
        return len(self.whole) > 1 and not outside

    def degree(self, layout: Layout) -> int:
        """Return among how many ranks tensors like it are cut."""
        return layout.expert_tp if self.of_experts else layout.tp

    def local(self, layout: Layout) -> tuple[int, ...]:
        """Return its shape on one rank."""
        shape = list(self.whole)
        if self.of_experts:
            shape[0] //= layout.ep
        if self.cut is not None:
            shape[self.cut] //= self.degree(layout)
        return tuple(shape)

    def numbers(self, layout: Layout) -> int:
        """Return how many numbers of it one rank has."""
        return prod(self.local(layout))

    def places(self, layout: Layout, tp_rank: int, ep_rank: int) -> Iterator[tuple[tuple[int, ...], Box]]:
        """Yield the boxes that a rank's tensor consists of, each with where its first number is in the whole.

        Args:
            tp_rank: among those that cut it.
            ep_rank: among those that divide the experts.
        """
        shape, corner = self.local(layout), [0] * len(self.whole)
        if self.of_experts:
            corner[0] = ep_rank * shape[0]
        if not self.halves:
            if self.cut is not None:
                corner[self.cut] = tp_rank * shape[self.cut]
            yield tuple(corner), Box((0,) * len(shape), shape)
            return
        rows, whole_rows = shape[_ROWS] // 2, self.whole[_ROWS] // 2
        for half in range(2):
            corner[_ROWS] = half * whole_rows + tp_rank * rows
            start, extent = [0] * len(shape), list(shape)
            start[_ROWS], extent[_ROWS] = half * rows, rows
            yield tuple(corner), Box(tuple(start), tuple(extent))


def stage_parameters(
    recipe: Recipe, layers: tuple[int, ...], stage: int, *, borrowed: bool = False, frozen: bool = False
) -> list[Parameter]:
    """Return the trained parameters of a stage.

    Args:
        borrowed: its MTP modules use the embedding of the first stage, which is on the same rank.
        frozen: those that are not trained instead.
    """
    model, last = recipe.model, stage == len(layers) - 1
    depths = model.num_nextn_predict_layers if last else 0
    first = sum(layers[:stage])
    found = []
    if stage == 0 or (depths and not borrowed):
        copied = model.num_nextn_predict_layers > 0 and len(layers) > 1 and not borrowed
        found.append(Parameter(EMBEDDING, (model.vocab_size, model.hidden_size), _ROWS, shared=copied))
    for layer in range(first, first + layers[stage]):
        found += _layer(model, f"decoder.layers.{layer}", moe=layer >= model.first_k_dense_replace)
    if last:
        found.append(Parameter("decoder.final_layernorm.weight", (model.hidden_size,)))
    for depth in range(depths):
        found += _mtp(model, f"mtp.layers.{depth}")
    if last:
        found.append(Parameter("output_layer.weight", (model.vocab_size, model.hidden_size), _ROWS))
    return [parameter for parameter in found if is_frozen(model.freeze, parameter.key) == frozen]


def _layer(model: ModelSettings, place: str, *, moe: bool) -> Iterator[Parameter]:
    width = (model.hidden_size,)
    yield Parameter(f"{place}.input_layernorm.weight", width)
    yield from _attention(model, f"{place}.self_attention")
    yield Parameter(f"{place}.pre_mlp_layernorm.weight", width)
    if not moe:
        yield from _gated(f"{place}.mlp", model.hidden_size, model.intermediate_size)
        return
    yield Parameter(f"{place}.mlp.router.weight", (model.n_routed_experts, model.hidden_size))
    yield from _gated(
        f"{place}.mlp.experts.experts", model.hidden_size, model.moe_intermediate_size, (model.n_routed_experts,)
    )
    if model.n_shared_experts:
        inner = model.n_shared_experts * model.moe_intermediate_size
        yield from _gated(f"{place}.mlp.shared_experts", model.hidden_size, inner)


def _attention(model: ModelSettings, place: str) -> Iterator[Parameter]:
    d, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    yield Parameter(f"{place}.linear_proj.weight", (d, heads * model.v_head_dim), _COLUMNS)
    if model.q_lora_rank is None:
        yield Parameter(f"{place}.linear_q_proj.weight", (queries, d), _ROWS)
    else:
        yield Parameter(f"{place}.linear_q_down_proj.weight", (model.q_lora_rank, d))
        yield Parameter(f"{place}.linear_q_up_proj.weight", (queries, model.q_lora_rank), _ROWS)
    yield Parameter(f"{place}.linear_kv_down_proj.weight", (latent + model.qk_rope_head_dim, d))
    up = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield Parameter(f"{place}.linear_kv_up_proj.weight", (up, latent), _ROWS)
    if model.q_lora_rank is not None:
        yield Parameter(f"{place}.q_layernorm.weight", (model.q_lora_rank,))
    yield Parameter(f"{place}.kv_layernorm.weight", (latent,))


def _gated(place: str, width: int, inner: int, stack: tuple[int, ...] = ()) -> Iterator[Parameter]:
    yield Parameter(f"{place}.linear_fc1.weight", (*stack, 2 * inner, width), _ROWS, halves=True)
    yield Parameter(f"{place}.linear_fc2.weight", (*stack, width, inner), _COLUMNS)


def _mtp(model: ModelSettings, place: str) -> Iterator[Parameter]:
    width = (model.hidden_size,)
    yield Parameter(f"{place}.enorm.weight", width)
    yield Parameter(f"{place}.hnorm.weight", width)
    yield Parameter(f"{place}.eh_proj.weight", (model.hidden_size, 2 * model.hidden_size), _ROWS)
    yield from _layer(model, f"{place}.transformer_layer", moe=model.num_moe_layers > 0)
    yield Parameter(f"{place}.final_layernorm.weight", width)
