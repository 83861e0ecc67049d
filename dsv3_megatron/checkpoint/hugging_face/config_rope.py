"""RoPE's keys in a published config.json, in old and new places, <-> ``rope_theta`` and ``rope_scaling`` of ours.

Absent keys mean what transformers means by them (``modeling_rope_utils.py``, 5.23): without ``mscale`` or
``mscale_all_dim`` cosine and sine are scaled by 0.1 log(factor) + 1, and without ``mscale_all_dim`` attention's logits
by nothing. Ours says the same with both: cosine and sine are scaled by the quotient of the two.
"""

from __future__ import annotations

import math
from typing import Any

from dsv3_megatron.checkpoint.hugging_face.config_keys import shown
from dsv3_megatron.model.settings import RopeScaling
from parallel.errors import CheckpointError

_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# Of YaRN, with the only value that is built: what cosine and sine, or the ramp, would else be multiplied by.
_FIXED = {"truncate": (True,), "partial_rotary_factor": (1,), "attn_factor": (1,), "extrapolation_factor": (1,)}


def rope_from_config(config: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` of ModelSettings.

    Args:
        max_positions: max_position_embeddings, from which YaRN extends where the file does not say.
    Raises: CheckpointError: two places contradict each other, or it is another method than plain RoPE and YaRN.
    """
    given = _one_of_all_places(config)
    kind = given.pop("rope_type", "default")
    theta = given.pop("rope_theta", 10000.0)
    for key, allowed in _FIXED.items():
        if (value := given.pop(key, allowed[0])) not in allowed:
            raise CheckpointError(
                f"config.json: RoPE's {key} = {shown(value)}, but only {allowed[0]} can be built here"
            )
    if kind == "default":
        if given and set(given) != {"original_max_position_embeddings"}:
            key = next(iter(given))
            raise CheckpointError(
                f"config.json: RoPE's {key} = {shown(given[key])} has no meaning without rope_type = yarn"
            )
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise CheckpointError(f"config.json: rope_type = {shown(kind)}, but only plain RoPE and yarn can be built here")
    return {"rope_theta": theta, "rope_scaling": _yarn(given, max_positions)}


def _one_of_all_places(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's keys that are not null, ``type`` as rope_type. Raises where two places differ."""
    found: dict[str, Any] = {}
    places: dict[str, str] = {}

    def add(key: str, value: Any, place: str) -> None:
        if value is None:
            return
        if isinstance(value, float) and not math.isfinite(value):  # also: NaN is not equal to itself
            raise CheckpointError(f"config.json: {place} = {value} is no finite number; write one")
        if found.setdefault(key, value) != value:
            raise CheckpointError(
                f"config.json: {place} = {shown(value)} contradicts {places[key]} = {shown(found[key])}; leave one of "
                "them"
            )
        places.setdefault(key, place)

    for outer in ("rope_scaling", "rope_parameters"):
        inside = config.get(outer)
        if inside is not None and not isinstance(inside, dict):
            raise CheckpointError(f"config.json: {outer} = {shown(inside)} is no list of keys; write them as an object")
        for key, value in (inside or {}).items():
            if isinstance(value, dict):
                raise CheckpointError(f"config.json: {outer}.{key}: RoPE by kinds of layers cannot be built here")
            add("rope_type" if key == "type" else key, value, f"{outer}.{key}")
    for key in ("rope_theta", "original_max_position_embeddings"):
        add(key, config.get(key), key)
    return found


def _yarn(given: dict[str, Any], max_positions: int) -> dict[str, Any]:
    if unknown := sorted(set(given) - {*_YARN, "attention_factor"}):
        raise CheckpointError(
            f"config.json: rope_scaling.{unknown[0]} = {shown(given[unknown[0]])} is not known here; YaRN has "
            f"{list(_YARN)}"
        )
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise CheckpointError(f"config.json: rope_scaling.{key} = {shown(value)} is no such number; write one")
    factor = given.get("factor")
    if factor is None or factor <= 0:
        raise CheckpointError(f"config.json: rope_scaling.factor = {factor} under yarn; set it to the extension, > 1")
    values = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": given.get("original_max_position_embeddings", max_positions),
        "beta_fast": given.get("beta_fast") or 32.0,  # transformers reads zero as absent
        "beta_slow": given.get("beta_slow") or 1.0,
    }
    return {**values, **_scales(factor, given)}


def _scales(factor: float, given: dict[str, Any]) -> dict[str, float]:
    """Return the ``mscale`` and ``mscale_all_dim`` that scale as the given keys do in transformers."""
    mscale, all_dim = given.get("mscale") or 0.0, given.get("mscale_all_dim") or 0.0
    wanted = given.get("attention_factor")
    if wanted is None:
        if mscale and all_dim:
            return {"mscale": mscale, "mscale_all_dim": all_dim}
        wanted = _scale(factor, 1.0)
    if "mscale" in given and math.isclose(cosine_scale(factor, mscale, all_dim), wanted, rel_tol=1e-12):
        return {"mscale": mscale, "mscale_all_dim": all_dim}
    if factor <= 1:
        if wanted != 1:
            raise CheckpointError(
                f"config.json: rope_scaling.attention_factor = {wanted} with factor = {factor} cannot be built here; "
                "set factor above 1, or leave it out"
            )
        return {"mscale": 1.0, "mscale_all_dim": all_dim}
    if not all_dim and wanted == _scale(factor, 1.0):
        return {"mscale": 1.0, "mscale_all_dim": 0.0}
    return {"mscale": (wanted * _scale(factor, all_dim) - 1) / (0.1 * math.log(factor)), "mscale_all_dim": all_dim}


def _scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def cosine_scale(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """Return what YaRN multiplies cosine and sine by, as megatron-core and DeepSeek's code do."""
    return _scale(factor, mscale) / _scale(factor, mscale_all_dim)


def rope_to_config(theta: float, scaling: RopeScaling | None, *, new_places: bool) -> dict[str, Any]:
    """Return RoPE's keys for transformers, vLLM and SGLang.

    Args:
        new_places: all under ``rope_parameters``; else ``rope_theta`` and ``rope_scaling``.
    """
    kind = "rope_type" if new_places else "type"
    yarn: dict[str, Any] = {}
    if scaling is not None:
        yarn = {kind: "yarn", **{key: getattr(scaling, key) for key in _YARN}}
        scale = cosine_scale(scaling.factor, scaling.mscale, scaling.mscale_all_dim)
        # transformers takes a weight of zero for an absent one; then the scale itself must be said.
        if not (scaling.mscale and scaling.mscale_all_dim) and scale != _scale(scaling.factor, 1.0):
            yarn["attention_factor"] = scale
    if new_places:
        return {"rope_parameters": {"rope_theta": theta, kind: "default", **yarn}}
    return {"rope_theta": theta, "rope_scaling": yarn or None}
