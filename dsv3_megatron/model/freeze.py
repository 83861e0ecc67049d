"""``model.freeze``: which parameters a name of the recipe stands for. No torch: asked by recipes and plans too.

Every parameter is of exactly one part, by its name: that of our modules, of Transformer Engine's, or in checkpoints.
``mtp`` and ``layers.N-M`` are places: all that is there, whatever its part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from dsv3_megatron.model.settings import ModelSettings
from parallel.errors import RecipeError

PARTS = ("embedding", "head", "attention", "dense", "experts", "shared_experts", "router", "norms")
MTP = "mtp"
_RANGE = re.compile(r"layers\.(\d+)(?:-(\d+))?$")
DECODER_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Where a parameter is, the first that its name contains: a gain stands inside the attention or layer that it belongs
# to, Transformer Engine's inside the linear layer after it, and experts and router inside a feed-forward.
_PLACES = (
    ("norm", "norms"),
    ("embedding.word_embeddings.", "embedding"),
    ("output_layer.", "head"),
    ("self_attention.", "attention"),
    (".router.", "router"),
    (".shared_experts.", "shared_experts"),
    (".experts.", "experts"),
    (".mlp.", "dense"),
    (".eh_proj.", MTP),
)


def is_frozen(freeze: Collection[str], name: str) -> bool:
    """Return whether a parameter, or a router's bias, is not trained.

    Args:
        freeze: ``model.freeze``.
        name: in the whole model, with or without a prefix of a state such as ``ema.`` taken off.
    """
    if not freeze:
        return False
    if part_of(name) in freeze or (MTP in freeze and name.startswith("mtp.")):
        return True
    layer = DECODER_LAYER.match(name)
    return layer is not None and int(layer[1]) in frozen_layers(freeze)


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to; of what joins an MTP module, which has no part, ``mtp``."""
    return next(part for place, part in _PLACES if place in name)


def frozen_layers(freeze: Collection[str]) -> set[int]:
    """Return the decoder layers, from 0, that are frozen as a whole."""
    return {layer for name in freeze if (found := _RANGE.match(name)) for layer in _range(found)}


def _range(found: re.Match[str]) -> range:
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def trained_parts(freeze: Collection[str], *, frozen: bool = False) -> dict[str, bool]:
    """Return of every part whether it is trained in a layer, which may be ``frozen`` as a whole."""
    return {part: not frozen and part not in freeze for part in PARTS}


def check_freeze(model: ModelSettings) -> None:
    """Raise RecipeError where ``model.freeze`` names what there is not, or leaves nothing to train."""
    for name in model.freeze:
        if wrong := _wrong(name, model):
            raise RecipeError(wrong)
    if not any(_trained(model)):
        raise RecipeError(f"model.freeze = {list(model.freeze)} freezes every parameter; leave something to train")


def _wrong(name: str, model: ModelSettings) -> str | None:
    """Return what is wrong with a name of ``model.freeze``, as a line; None where nothing is."""
    last = model.num_hidden_layers - 1
    if found := _RANGE.match(name):
        layers = _range(found)
        if not layers or layers[-1] > last:
            return f"model.freeze names {name!r}, but the model's layers are 0 to {last}; write layers.N or layers.N-M"
        return None
    if name not in (*PARTS, MTP):
        known = ", ".join((*PARTS, MTP))
        return f"model.freeze names {name!r}, which is no part of the model; use some of {known}, layers.N, layers.N-M"
    there = {part for part, _ in _everything(model)}
    if name not in there and not (name == MTP and model.num_nextn_predict_layers):
        return f"model.freeze names {name!r}, of which this model has none; leave it out"
    return None


def _trained(model: ModelSettings) -> Iterator[str]:
    """Yield the parts that are trained somewhere."""
    layers = frozen_layers(model.freeze)
    for part, place in _everything(model):
        if part not in model.freeze and place not in layers and not (place == MTP and MTP in model.freeze):
            yield part


def _everything(model: ModelSettings) -> Iterator[tuple[str, int | str]]:
    """Yield every part at every place: number of a decoder layer, ``mtp``, or "ends"."""
    yield from ((part, "ends") for part in ("embedding", "head", "norms"))
    for layer in range(model.num_hidden_layers):
        yield from ((part, layer) for part in layer_parts(model, moe=layer >= model.first_k_dense_replace))
    if model.num_nextn_predict_layers:
        yield from ((part, MTP) for part in (*layer_parts(model, moe=model.num_moe_layers > 0), MTP))


def layer_parts(model: ModelSettings, *, moe: bool) -> Sequence[str]:
    """Return the parts that a layer consists of."""
    if not moe:
        return ("attention", "norms", "dense")
    shared = ("shared_experts",) if model.n_shared_experts else ()
    return ("attention", "norms", "router", "experts", *shared)
