"""The ``model`` section of a recipe. Fields carry the names of DeepSeek-V3's published ``config.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from parallel.errors import RecipeError


class RopeScaling(BaseModel):
    """YaRN context extension (arXiv 2309.00071), keys as published. Null in 4K pretraining: plain RoPE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["yarn"] = Field("yarn", description="the method")
    factor: PositiveFloat = Field(40.0, description="positions after the extension, in those before it")
    original_max_position_embeddings: PositiveInt = Field(4096, description="positions before the extension")
    beta_fast: PositiveFloat = Field(
        32.0, description="turns over the original positions from which on a dimension is left as it is"
    )
    beta_slow: PositiveFloat = Field(
        1.0, description="turns up to which a dimension is stretched by the whole factor; between the two in part"
    )
    mscale: float = Field(
        1.0, description="weight of log(factor) in the scale of cosine and sine, over mscale_all_dim's"
    )
    mscale_all_dim: float = Field(1.0, description="weight of log(factor) in the scale of attention's logits")


class ModelSettings(BaseModel):
    """Shape of the model (arXiv 2412.19437 section 4.2; names and defaults of the published configuration)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: Literal["deepseek_v3", "kimi_k2", "joyai_llm_flash", "glm4_moe_lite", "deepseek_v2"] = Field(
        "deepseek_v3", description="published class that the weights came as, and that exports name"
    )
    vocab_size: PositiveInt = Field(129280, description="rows of embedding and output head")
    hidden_size: PositiveInt = Field(7168, description="width of the residual stream")
    intermediate_size: PositiveInt = Field(18432, description="width of the dense feed-forward layers")
    moe_intermediate_size: PositiveInt = Field(2048, description="width of one expert")
    num_hidden_layers: PositiveInt = Field(61, le=10_000, description="decoder layers, MTP modules not counted")
    first_k_dense_replace: NonNegativeInt = Field(3, description="leading layers that are dense instead of MoE")
    num_attention_heads: PositiveInt = Field(128, description="heads of multi-head latent attention (MLA)")
    q_lora_rank: PositiveInt | None = Field(1536, description="width of the query latent; null = full-rank queries")
    kv_lora_rank: PositiveInt = Field(512, description="width of the latent that keys and values are made of")
    qk_nope_head_dim: PositiveInt = Field(128, description="width of a head's query and key without position")
    qk_rope_head_dim: PositiveInt = Field(64, description="width of a head's query and key that RoPE turns")
    v_head_dim: PositiveInt = Field(128, description="width of a head's value")
    n_routed_experts: PositiveInt = Field(
        256, le=100_000, description="experts of a MoE layer that the router chooses from"
    )
    n_shared_experts: NonNegativeInt = Field(1, description="experts of a MoE layer that every token goes through")
    num_experts_per_tok: PositiveInt = Field(8, description="routed experts a token is sent to (top-k)")
    n_group: PositiveInt = Field(8, description="groups the routed experts are divided into (nodes, in training)")
    topk_group: PositiveInt = Field(4, description="groups a token may be sent to")
    routed_scaling_factor: PositiveFloat = Field(2.5, description="what the routed experts' output is multiplied by")
    scoring_func: Literal["sigmoid", "softmax"] = Field("sigmoid", description="affinity of a token to an expert")
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy", "capacity"] = Field(
        "noaux_tc",
        description="noaux_tc = top-k of affinity + bias, groups by their two best; greedy = top-k of affinity; "
        "group_limited_greedy = groups by their best; capacity = overflow to the next best with room",
    )
    capacity_factor: PositiveFloat = Field(
        1.25, description="topk_method=capacity: tokens an expert takes of a microbatch, in even shares"
    )
    norm_topk_prob: bool = Field(True, description="weights of the chosen experts add up to 1, before the scaling")
    num_nextn_predict_layers: NonNegativeInt = Field(1, le=1_000, description="multi-token-prediction depths (MTP)")
    rms_norm_eps: PositiveFloat = Field(1e-6, description="what RMSNorm adds to the mean square")
    rope_theta: PositiveFloat = Field(10000.0, description="base of RoPE's wavelengths")
    rope_scaling: RopeScaling | None = Field(None, description="YaRN context extension; null = plain RoPE, as in 4K")
    max_position_embeddings: PositiveInt = Field(4096, description="positions the model is made for, as exports say")
    initializer_range: NonNegativeFloat = Field(0.006, description="standard deviation at initialisation (4.2)")
    freeze: tuple[str, ...] = Field(
        (),
        description="what is not trained: some of embedding, head, attention, dense, experts, shared_experts, router, "
        "norms, mtp, and layers by number, such as layers.0-12",
    )
    tie_word_embeddings: Literal[False] = Field(False, description="one matrix for embedding and head; not offered")

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model (MTP modules not counted)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def check(self) -> None:
        """Raise RecipeError where two fields contradict each other; each is named with a value that would do."""

        def refuse(field: str, why: str, fix: str) -> None:
            raise RecipeError(f"model.{field} = {getattr(self, field)} {why}; {fix}")

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
        if groups > 1 and self.topk_method in ("greedy", "capacity"):
            refuse("n_group", f"has no effect with model.topk_method = {self.topk_method}", "set it to 1")
        if self.topk_method == "capacity" and self.scoring_func != "softmax":
            refuse("scoring_func", "cannot be had with model.topk_method = capacity", "set it to softmax")
        if groups > 1 and experts // groups < 2 and self.topk_method == "noaux_tc":
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
