"""The ``model`` section of a recipe. Fields carry the names of DeepSeek-V3's published ``config.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from parallel.errors import RecipeError


class RopeScaling(BaseModel):
    """YaRN context extension (arXiv 2309.00071), keys as published. Null in 4K pretraining: plain RoPE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["yarn"] = "yarn"
    factor: PositiveFloat = 40.0
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class ModelSettings(BaseModel):
    """Shape of the model (arXiv 2412.19437 section 4.2; names and defaults of the published configuration)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: PositiveInt = Field(129280, description="rows of embedding and output head")
    hidden_size: PositiveInt = 7168
    intermediate_size: PositiveInt = Field(18432, description="width of the dense feed-forward layers")
    moe_intermediate_size: PositiveInt = Field(2048, description="width of one expert")
    num_hidden_layers: PositiveInt = 61
    first_k_dense_replace: NonNegativeInt = Field(3, description="leading layers that are dense instead of MoE")
    num_attention_heads: PositiveInt = 128
    q_lora_rank: PositiveInt | None = Field(1536, description="width of the query latent; null = full-rank queries")
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    n_routed_experts: PositiveInt = 256
    n_shared_experts: NonNegativeInt = 1
    num_experts_per_tok: PositiveInt = Field(8, description="routed experts a token is sent to (top-k)")
    n_group: PositiveInt = Field(8, description="groups the routed experts are divided into (nodes, in training)")
    topk_group: PositiveInt = Field(4, description="groups a token may be sent to")
    routed_scaling_factor: PositiveFloat = 2.5
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "capacity"] = Field(
        "noaux_tc", description="noaux_tc = top-k of affinity + bias; capacity = overflow to the next best with room"
    )
    capacity_factor: PositiveFloat = Field(
        1.25, description="topk_method=capacity: tokens an expert takes of a microbatch, in even shares"
    )
    norm_topk_prob: bool = True
    num_nextn_predict_layers: NonNegativeInt = Field(1, description="multi-token-prediction depths (MTP)")
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: PositiveInt = 4096
    initializer_range: NonNegativeFloat = Field(0.006, description="standard deviation at initialisation (4.2)")
    tie_word_embeddings: Literal[False] = False

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model (MTP modules not counted)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def check(self) -> None:
        """Raise RecipeError where two fields contradict each other; each is named with a value that would do."""

        def refuse(field: str, why: str, mend: str) -> None:
            raise RecipeError(f"model.{field} = {getattr(self, field)} {why}; {mend}")

        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            fits = [g for g in range(1, experts + 1) if experts % g == 0]
            near = sorted(fits, key=lambda g: abs(g - groups))[:2]
            refuse("n_group", f"does not divide model.n_routed_experts = {experts}", f"nearest that do: {sorted(near)}")
        if self.topk_group > groups:
            refuse("topk_group", f"is above model.n_group = {groups}", f"set it to {groups} or less")
        reachable = experts // groups * self.topk_group
        if self.num_experts_per_tok > reachable:
            refuse(
                "num_experts_per_tok",
                f"is above the {reachable} experts in model.topk_group = {self.topk_group} groups",
                f"set it to {reachable} or less, or raise model.topk_group",
            )
        if groups > 1 and experts // groups < 2:
            refuse("n_group", "leaves one expert a group, but a group is scored by its two best", "lower it")
        if self.first_k_dense_replace > self.num_hidden_layers:
            refuse(
                "first_k_dense_replace",
                f"is above model.num_hidden_layers = {self.num_hidden_layers}",
                f"set it to {self.num_hidden_layers} or less",
            )
        for field in ("hidden_size", "moe_intermediate_size"):
            if (width := getattr(self, field)) % 8:
                refuse(field, "is not a multiple of 8, which grouped products need", f"use {(width + 7) // 8 * 8}")
        if self.qk_rope_head_dim % 2:
            refuse("qk_rope_head_dim", "is odd, but RoPE rotates pairs", f"set it to {self.qk_rope_head_dim + 1}")
