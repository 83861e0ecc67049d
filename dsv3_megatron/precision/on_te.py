"""Where Transformer Engine carries the FP8 policy out otherwise. No torch: asked by plans and tables."""

from __future__ import annotations

from dsv3_megatron.precision.settings import Fp8Settings


def deviations(fp8: Fp8Settings) -> list[str]:
    """Return where TE does something else than the policy's words, a line each, to be told at the start of a run."""
    found = []
    if fp8.swiglu_cache == "e4m3":
        found.append(
            "te keeps, of dense and shared experts, SwiGLU's output in E4M3 too: only routed ones compute it again"
        )
    if fp8.attention_output_cache != "once":
        found.append("te keeps the input of the linear after attention in BF16, one copy (attention_output_cache=once)")
    if set(fp8.tiles) == {"tensor"}:
        found.append(
            "te adds up forward products of tensor tiles in the precision of a tensor core (fast accumulation)"
        )
    if fp8.scaling == "delayed" and fp8.power_of_two_scales:
        found.append("te's delayed scales are exact, not powers of two (power_of_two_scales has no effect)")
    return found


def as_carried_out(fp8: Fp8Settings) -> Fp8Settings:
    """Return the policy with what TE does instead of it, for a run and for its plan.

    megatron-core lets the linear after attention keep its input as the attention gave it, since TE 2.6.
    """
    return fp8.model_copy(update={"attention_output_cache": "once"})
