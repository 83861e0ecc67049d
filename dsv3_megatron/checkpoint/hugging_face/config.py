"""A published ``config.json`` <-> the ``model`` section of a recipe."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dsv3_megatron.model.settings import ModelSettings
from parallel.errors import CheckpointError

FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# What our model cannot be; key -> the values it stands for.
_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,), "model_type": ("deepseek_v3",)}
_OURS = {"freeze"}  # of a training, not of the model


def settings_from_config(config: dict[str, Any]) -> ModelSettings:
    """Return the model that a published configuration describes.

    Raises: CheckpointError: it describes another kind of model, naming the key.
    """
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"config.json: {key} = {config[key]!r}, but only {allowed[0]!r} can be built here")
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads", heads) not in (heads, None):
        raise CheckpointError(
            f"config.json: num_key_value_heads = {config['num_key_value_heads']} is not num_attention_heads = {heads}; "
            "latent attention has a key and value for every head"
        )
    values = {key: config[key] for key in ModelSettings.model_fields if key in config and key not in _OURS}
    values.setdefault("num_nextn_predict_layers", config.get("num_mtp_layers", 0))
    values |= _rope(config)
    try:
        model = ModelSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"config.json: {key} = {first['input']}: {first['msg']}") from None
    model.check()
    return model


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's keys: ``rope_theta`` and ``rope_scaling`` as published, or transformers 5's ``rope_parameters``."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("type", None) or given.pop("rope_type", None) or "default"
    given.pop("rope_type", None)
    theta = given.pop("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **given}}


def config_from_settings(model: ModelSettings, dtype: str, *, begin: int | None, end: int | None) -> dict[str, Any]:
    """Return the configuration that transformers, vLLM and SGLang read.

    Args:
        dtype: of the files: fp32, bf16, or fp8.
        begin, end: ids of the tokens that begin and end a text, where there is a tokenizer.
    """
    values = model.model_dump(mode="json", exclude=_OURS)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **values,
        "num_key_value_heads": model.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "bos_token_id": begin,
        "eos_token_id": end,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
        **({"quantization_config": FP8_CONFIG} if dtype == "fp8" else {}),
    }
