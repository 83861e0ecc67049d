"""Which numbers of a folder become which box of ours: its tensors under one set of names, found and checked by headers.

Names vary: a prefix where a text model lies inside a larger one, or none; an expert a tensor, or all of a layer stacked
as transformers 5 holds them. Values do not matter here, and nothing is guessed: a tensor that has no place is refused,
or is of a kind that is known to be left out, and told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_megatron.checkpoint.hugging_face.headers import Header, and_more, read_headers
from dsv3_megatron.checkpoint.hugging_face.names import Published, published_tensors
from dsv3_megatron.checkpoint.hugging_face.quantisation import (
    FP8,
    SCALES,
    Quantisation,
    check_dtype,
    quantisation_of,
    refuse_packed,
)
from dsv3_megatron.model.settings import ModelSettings
from parallel.errors import CheckpointError

# transformers 5.23 saves the layers of kimi_k25's text model as "blocks", its word for those of the vision tower.
_BODY = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?(embed_tokens|layers|blocks|norm)(\..*)")
_HEAD = re.compile(r"(?:model\.)?(?:language_model\.)?(lm_head\..*)")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# Beside the text model in files of a larger one.
_TOWERS = re.compile(
    r"(?:model\.)?(vision_tower|vision_model|visual|mm_projector|multi_modal_projector|audio_tower)\..*"
)
_COMPUTED = "rotary_emb.inv_freq"  # not learned; older files hold it
_ACTIVATIONS = ".input_scale"  # of a server's activations; nothing of the weights depends on it


@dataclass(frozen=True)
class Stored:
    """A matrix or vector of the files: a tensor, or one expert of a stack."""

    tensor: Header
    expert: int | None = None
    scale: Header | None = None  # of FP8 numbers
    tile: tuple[int, int] = (0, 0)  # elements that share a scale


@dataclass(frozen=True)
class Source:
    """Where a box of ours is read."""

    stored: Stored
    target: Published
    copy_of: Stored | None = None  # what it must repeat; nothing is stored then


@dataclass(frozen=True)
class Sources:
    """All that is read of a folder, and what there is to tell about it."""

    folder: Path
    model: ModelSettings  # with the MTP depths that have weights
    quantisation: Quantisation
    found: tuple[Source, ...]
    told: tuple[str, ...]

    @property
    def is_float32(self) -> bool:
        """Whether all weights are float32."""
        return all(source.stored.tensor.dtype == "F32" for source in self.found)


def find_sources(model: ModelSettings, folder: Path, config: dict[str, Any]) -> Sources:
    """Return where the weights of a model lie in a folder.

    Raises: CheckpointError: a tensor is missing, or has no place in the model; a dtype, shape or scale does not fit.
    """
    headers = read_headers(folder)
    try:
        quantisation = quantisation_of(config)
        refuse_packed(headers.values())
        names, told = _our_names(headers)
        names, model, more = _without_absent_mtp(model, folder, names)
        told += more
        found = list(_sources(model, names, quantisation))
        told += _refuse_rest(names, found)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.args[0]}") from None
    return Sources(folder, model, quantisation, tuple(found), tuple(told))


def _our_names(headers: dict[str, Header]) -> tuple[dict[str, Header], list[str]]:
    """Return the text model's tensors under the names of ``deepseek_v3``, and what is told of the others."""
    names: dict[str, Header] = {}
    towers: Counter[str] = Counter()
    for name, header in headers.items():
        if tower := _TOWERS.fullmatch(name):
            towers[tower[1]] += 1
            continue
        ours = name
        if body := _BODY.fullmatch(name):
            ours = f"model.{body[1].replace('blocks', 'layers')}{body[2]}"
        elif head := _HEAD.fullmatch(name):
            ours = head[1]
        if ours in names:
            raise CheckpointError(f"{names[ours].name} and {name} stand for one tensor; keep one of them")
        names[ours] = header
    told = [
        f"{count} tensors of {tower} are left out: the text model alone is taken" for tower, count in towers.items()
    ]
    return names, told


def _without_absent_mtp(
    model: ModelSettings, folder: Path, names: dict[str, Header]
) -> tuple[dict[str, Header], ModelSettings, list[str]]:
    """Return the tensors, the model with as many MTP depths as can be built from them, and what is told of the rest."""
    first, wanted, told = model.num_hidden_layers, model.num_nextn_predict_layers, []
    depths = sum(f"model.layers.{first + depth}.eh_proj.weight" in names for depth in range(wanted))
    if depths < wanted:
        told.append(f"model.num_nextn_predict_layers = {depths}: {folder} holds no weights of more MTP modules")
    is_dense = not model.num_moe_layers
    for depth in range(depths):
        place = f"model.layers.{first + depth}.mlp."
        if (f"{place}gate_proj.weight" in names) != is_dense and any(name.startswith(place) for name in names):
            layers = tuple(f"model.layers.{first + behind}." for behind in range(depth, depths))
            dropped = {name for name in names if name.startswith(layers)}
            names = {name: header for name, header in names.items() if name not in dropped}
            kind, built = ("MoE", "dense") if is_dense else ("dense", "MoE")
            told.append(
                f"model.num_nextn_predict_layers = {depth}: the MTP module in layer {first + depth} is {kind}, and of "
                f"this model a {built} one can be built alone; {len(dropped)} tensors are left out"
            )
            depths = depth
            break
    return names, model.model_copy(update={"num_nextn_predict_layers": depths}), told


def _sources(model: ModelSettings, names: dict[str, Header], quantisation: Quantisation) -> Iterator[Source]:
    wanted = list(_targets(model, names))
    if missing := sorted({name for name, _, target in wanted if name not in names and not target.copy_of}):
        raise CheckpointError(
            f"the folder lacks {missing[0]}{and_more(missing)}, which its config.json asks for; fetch it again"
        )
    for name, expert, target in wanted:
        if name in names:
            copy_of = _stored(names, target.copy_of, None, target, quantisation) if target.copy_of else None
            yield Source(_stored(names, name, expert, target, quantisation), target, copy_of)


def _targets(model: ModelSettings, names: dict[str, Header]) -> Iterator[tuple[str, int | None, Published]]:
    """Yield (name, expert of a stack, box) of what is read: the table's tensors, of experts those that are there."""
    experts = model.n_routed_experts
    for tensor in published_tensors(model):
        found = _EXPERT.fullmatch(tensor.name)
        stack = f"{found[1]}.{'down' if found[3] == 'down' else 'gate_up'}_proj" if found else ""
        if found is None or stack not in names or tensor.name in names:
            yield tensor.name, None, tensor
        elif found[3] == "down":
            _check_shape(names[stack], (experts, *tensor.shape))
            yield stack, int(found[2]), tensor
        elif found[3] == "gate":  # both halves of a matrix of ours, which a stack of the files holds as we do
            rows, columns = tensor.shape
            both = replace(tensor, name=stack, shape=(2 * rows, columns), extent=(1, 2 * rows, columns))
            _check_shape(names[stack], (experts, *both.shape))
            yield stack, int(found[2]), both


def _stored(
    names: dict[str, Header], name: str, expert: int | None, target: Published, quantisation: Quantisation
) -> Stored:
    """Return a tensor of the files with its scale. Raises: CheckpointError: its dtype, shape or scale does not fit."""
    header = names[name]
    check_dtype(header)
    if expert is None:
        _check_shape(header, target.shape)
    scales = [names[name + end] for end in SCALES if name + end in names]
    if header.dtype != FP8:
        if scales:
            raise CheckpointError(
                f"{header.file}: {header.name} is {header.dtype}, yet there is {scales[0].name}; fetch the files again"
            )
        return Stored(header, expert)
    if len(target.shape) != 2:
        raise CheckpointError(f"{header.file}: {header.name} is FP8 and no matrix; fetch the files again")
    if len(scales) != 1:
        wrong = " and ".join(scale.name for scale in scales) or f"no {header.name}{SCALES[0]}"
        raise CheckpointError(f"{header.file}: {header.name} is FP8, but there is {wrong}; fetch the files again")
    (scale,) = scales
    shape = scale.shape
    if expert is not None:
        if shape[:1] != header.shape[:1]:
            raise CheckpointError(
                f"{scale.file}: {scale.name} has shape {shape} for {header.shape[0]} experts; fetch the files again"
            )
        shape = shape[1:]
    return Stored(header, expert, scale, quantisation.tile(target.shape, scale, shape))


def _check_shape(header: Header, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise CheckpointError(
            f"{header.file}: {header.name} has shape {header.shape}, its config.json says {shape}; "
            "fetch the files or the configuration again"
        )


def _refuse_rest(names: dict[str, Header], found: list[Source]) -> list[str]:
    """Refuse tensors that nothing reads, and return what is told of those that are left out."""
    headers = [header for source in found for header in (source.stored.tensor, source.stored.scale) if header]
    used = {header.name for header in headers}
    rest = sorted(name for name, header in names.items() if header.name not in used and not name.endswith(_COMPUTED))
    activations = [name for name in rest if name.endswith(_ACTIVATIONS)]
    rest = [name for name in rest if name not in set(activations)]
    for name in rest:
        for end in SCALES:
            if name.endswith(end) and name.removesuffix(end) not in names:
                raise CheckpointError(
                    f"{names[name].file}: {names[name].name} has no {names[name].name.removesuffix(end)}; "
                    "fetch the files again"
                )
    if rest:
        raise CheckpointError(
            f"the folder holds {names[rest[0]].name}{and_more(rest)}, which a model of its config.json does not have; "
            "check the configuration"
        )
    return [f"{len(activations)} scales of activations (*{_ACTIVATIONS}) are left out"] if activations else []
