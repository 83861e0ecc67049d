"""A published ``config.json`` <-> the ``model`` section of a recipe.

What decides is the mathematics, not the name: a key that changes it and is not built is refused, whatever
``model_type`` says; a key that nobody here knows is told.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from dsv3_megatron.checkpoint.hugging_face.config_keys import ALIASES, AROUND, HARMLESS, OURS, is_known, refusal, shown
from dsv3_megatron.checkpoint.hugging_face.config_rope import rope_from_config, rope_to_config
from dsv3_megatron.checkpoint.hugging_face.families import FAMILIES, OUTSIDE, Family
from dsv3_megatron.model.settings import ModelSettings
from parallel.errors import CheckpointError

# No published model is near them; each row costs time and memory before its weights are looked at. Layers and experts
# have limits of their own in ModelSettings.
_MOST = {
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
    "n_shared_experts": 10_000,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "q_lora_rank",
         "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        1 << 20,
    ),
}  # fmt: skip
_MOST_EXPERTS = 200_000  # of all layers together
_MOST_TOLD = 100  # keys that are not known, in a line each
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def settings_from_config(config: dict[str, Any]) -> ModelSettings:
    """Return the model that a published configuration describes; of one with a ``text_config``, the text model.

    Raises: CheckpointError: it describes another kind of model, naming the key.
    """
    text = text_model(config)
    for key, value in [*text.items(), *config.items()]:
        rule = refusal(key)
        if rule is not None and value is not None and not _is_one_of(value, rule[0]):
            raise CheckpointError(_refused(key, value, rule[1]))
    model_type = _model_type(text)
    family = FAMILIES[model_type]
    values = _merged(text, family)
    for key, allowed in family.gate.items():
        if values.get(key, allowed[0]) not in allowed:
            built = " or ".join(map(repr, allowed))
            raise CheckpointError(f"config.json: {key} = {shown(values[key])}, but {model_type} computes {built}")
    if (architectures := text.get("architectures") or []) not in ([], [family.architecture]):
        raise CheckpointError(
            f"config.json: architectures = {shown(architectures)} contradicts model_type = {model_type!r}, which is "
            f"{family.architecture}; a model of another class does not become one by a changed model_type"
        )
    values |= rope_from_config(text, values.get("max_position_embeddings", _default("max_position_embeddings")))
    if values.get("topk_method") == "greedy":
        values |= {"n_group": 1, "topk_group": 1}  # the class does not look at them
    try:
        model = ModelSettings.model_validate({**values, "model_type": model_type}, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"config.json: {key} = {shown(first['input'])}: {first['msg']}") from None
    _check_sizes(model)
    model.check()
    _check_derived(text, model)
    return model


def text_model(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the text model: all of it, or what stands under ``text_config``."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def told_by_config(config: dict[str, Any]) -> list[str]:
    """Return what somebody who imports a configuration should know: one line for each key that was not used."""
    text = text_model(config)
    lines: list[str] = []
    if text is not config:
        lines.append("config.json: only the text model under text_config is taken")
    if text.get("model_type") is None:
        lines.append("config.json: model_type is absent; taken as deepseek_v3")
    unknown = {key: value for key, value in text.items() if not is_known(key)}
    if text is not config:
        beside = {
            key: value for key, value in config.items() if key not in AROUND and value not in (None, text.get(key))
        }
        unknown |= {key: value for key, value in beside.items() if key not in HARMLESS}
    told = list(unknown.items())[:_MOST_TOLD]
    lines += [
        f"config.json: {shown(key)[1:-1]} = {shown(value)} is not known here and was not used" for key, value in told
    ]
    if more := len(unknown) - len(told):
        lines.append(f"config.json: {more:,} more keys are not known here and were not used")
    return lines


def _check_sizes(model: ModelSettings) -> None:
    """Refuse a model that no file can hold, before anything is done for each of its layers and experts."""
    values = model.model_dump()
    for key, most in _MOST.items():
        if values[key] is not None and values[key] > most:
            raise CheckpointError(f"config.json: {key} = {values[key]:,} is above {most:,}; correct it")
    matrices = (model.num_hidden_layers + model.num_nextn_predict_layers) * model.n_routed_experts
    if matrices > _MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: n_routed_experts = {model.n_routed_experts:,} in num_hidden_layers = "
            f"{model.num_hidden_layers:,} are more than {_MOST_EXPERTS:,} experts; correct them"
        )
    for key, value in [*values.items(), *(values["rope_scaling"] or {}).items()]:
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"config.json: {key} = {value} is no finite number; correct it")


def _refused(key: str, value: object, why: str) -> str:
    return f"config.json: {key} = {shown(value)} is refused: {why}"


def _is_one_of(value: object, allowed: tuple[Any, ...]) -> bool:
    """Whether a value is one of those; True is not 1 here."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)


def _default(field: str) -> Any:
    return ModelSettings.model_fields[field].default


def _model_type(config: dict[str, Any]) -> str:
    """Return the name of the family. Raises CheckpointError where name or architecture is another's."""
    name, architectures = config.get("model_type") or "deepseek_v3", config.get("architectures") or []
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        mend = f"this family has {', '.join(FAMILIES)}"
        if architectures == [FAMILIES["deepseek_v3"].architecture]:
            mend = (
                f"if it is deepseek_v3 under another name, as architectures = {architectures} says, write deepseek_v3"
            )
        raise CheckpointError(_refused("model_type", name, f"it {OUTSIDE.get(str(name), 'is not known here')}; {mend}"))
    return name


def _merged(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return the fields of ModelSettings that the file gives under any name, null as absent, over its defaults."""
    given: dict[str, Any] = {}
    for key, value in config.items():
        field = ALIASES.get(key, key)
        if value is None or field in OURS or field not in ModelSettings.model_fields:
            continue
        if field in given and given[field] != value:
            raise CheckpointError(
                f"config.json: {key} = {shown(value)} contradicts another name of {field}, = {shown(given[field])}; "
                "leave one"
            )
        given[field] = value
    if "q_lora_rank" in config:
        given["q_lora_rank"] = config["q_lora_rank"]  # here null is a value: full-rank queries
    for key in ("n_shared_experts", "n_group", "topk_group"):
        if key in config and config[key] is None:
            given[key] = 0 if key == "n_shared_experts" else 1  # null: none of them; no groups
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list) and "first_k_dense_replace" not in given:
        given["first_k_dense_replace"] = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "qk_rope_head_dim" not in given and config.get("head_dim") and family.new_places:
        given["qk_rope_head_dim"] = config["head_dim"]  # another name of it in this class
    return {**family.defaults, **given}


def _check_derived(config: dict[str, Any], model: ModelSettings) -> None:
    """Raise CheckpointError where a key that follows from others contradicts them."""
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    expected = {
        "num_key_value_heads": (model.num_attention_heads, "num_attention_heads; latent attention has a key a head"),
        "head_dim": (model.qk_rope_head_dim, "qk_rope_head_dim"),
        "qk_head_dim": (model.qk_nope_head_dim + model.qk_rope_head_dim, "qk_nope_head_dim + qk_rope_head_dim"),
        "mlp_layer_types": (
            ["dense"] * dense + ["sparse"] * (model.num_hidden_layers - dense),
            "what first_k_dense_replace and num_hidden_layers say",
        ),
    }
    for key, (value, what) in expected.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"config.json: {key} = {shown(config[key])} is not {shown(value)}, which is {what}")


def config_from_settings(model: ModelSettings, dtype: str, *, begin: int | None, end: int | None) -> dict[str, Any]:
    """Return the configuration that transformers, vLLM and SGLang read: the keys of the model's class, in its places.

    Args:
        dtype: of the files: fp32, bf16, or fp8.
        begin, end: ids of the tokens that begin and end a text, where there is a tokenizer.
    Raises: CheckpointError: no published class computes this model.
    """
    family = FAMILIES[model.model_type]
    for key, allowed in family.gate.items():
        if (value := getattr(model, key)) not in allowed:
            built = " or ".join(map(str, allowed))
            raise CheckpointError(
                f"model.{key} = {value} cannot be exported: {model.model_type} computes {built}, "
                "and other programs would run another model"
            )
    if model.num_nextn_predict_layers and not family.has_mtp:
        raise CheckpointError(
            f"model.num_nextn_predict_layers = {model.num_nextn_predict_layers} cannot be exported: "
            f"{model.model_type} has no MTP modules; set model.num_nextn_predict_layers=0"
        )
    left_out = OURS | {"rope_theta", "rope_scaling"} | (set() if family.has_mtp else {"num_nextn_predict_layers"})
    values = {key: value for key, value in model.model_dump(mode="json").items() if key not in left_out}
    dense, experts = model.first_k_dense_replace, model.num_moe_layers
    layers = (
        {"mlp_layer_types": ["dense"] * dense + ["sparse"] * experts} if family.new_places else {"moe_layer_freq": 1}
    )
    return {
        "architectures": [family.architecture],
        **values,
        **rope_to_config(model.rope_theta, model.rope_scaling, new_places=family.new_places),
        **layers,
        "num_key_value_heads": model.num_attention_heads,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "bos_token_id": begin,
        "eos_token_id": end,
        "use_cache": True,
        "torch_dtype": "float32" if dtype == "fp32" else "bfloat16",
        **({"quantization_config": FP8_CONFIG} if dtype == "fp8" else {}),
    }
