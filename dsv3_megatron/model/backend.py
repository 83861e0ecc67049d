"""Which leaf modules the model is made of: Transformer Engine's on GPUs, pure PyTorch ones everywhere else.

A backend answers megatron-core's ``BackendSpecProvider`` protocol, plus ``duplicated_linear``: the layer whose whole
weight every TP rank holds. Everything above the leaves is the same code on both.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch

from dsv3_megatron.megatron.host import adapt_host

adapt_host()

import megatron.core.transformer.multi_latent_attention as attention
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules

from dsv3_megatron.model.layers.attention import CoreAttention, CoreAttentionBesideTE
from dsv3_megatron.model.layers.experts import DownLinear, GateUpLinear, GroupedExperts
from dsv3_megatron.model.layers.linear import ColumnParallelLinear, DuplicatedLinear, RowParallelLinear
from dsv3_megatron.model.layers.norm import RMSNorm
from dsv3_megatron.model.layers.swiglu import SwiGLU
from dsv3_megatron.precision import transformer_engine
from parallel.errors import PackageError


class TorchBackend(BackendSpecProvider):
    """Pure PyTorch leaf modules: a CPU with gloo, or a GPU without Transformer Engine."""

    name = "torch"
    attention = ""  # what is to be said of the attention in use: nothing, it is this backend's own

    def __init__(self) -> None:
        # MLA knows a duplicated layer only by the name TELinear (megatron-core 0.16.1); can go when it asks the spec.
        attention.TELinear = DuplicatedLinear

    def column_parallel_linear(self) -> type:
        """Linear with its output dimension over TP."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Linear with its input dimension over TP."""
        return RowParallelLinear

    def duplicated_linear(self) -> type:
        """Linear that every TP rank holds whole."""
        return DuplicatedLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and the linear after it are two modules."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """There is no fused one."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        """RMSNorm."""
        return RMSNorm

    def core_attention(self) -> type:
        """Softmax attention without its projections."""
        return CoreAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool = True, moe_use_legacy_grouped_gemm: bool = False
    ) -> tuple[type, MLPSubmodules]:
        """The routed experts and their two layers."""
        return GroupedExperts, MLPSubmodules(linear_fc1=GateUpLinear, linear_fc2=DownLinear)

    def activation_func(self) -> type:
        """SwiGLU, which computes its output again in backward."""
        return SwiGLU


def make_te_backend(why_torch: str | None = None) -> BackendSpecProvider:
    """Return Transformer Engine's leaf modules, where TE is installed.

    ``why_torch``: why torch's attention is to serve among them; None = TE's own does.
    """
    # Needs Transformer Engine, which the torch backend does without.
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    from dsv3_megatron.megatron.transformer_engine import adapt_te  # likewise

    adapt_te()

    class TEBackend(TESpecProvider):
        """megatron-core's own provider, with the one question it lacks."""

        name = "te"
        attention = f"torch's fused attention ({why_torch})" if why_torch else ""

        def duplicated_linear(self) -> type:
            """TELinear, which MLA builds with ``parallel_mode="duplicated"``."""
            return self.linear()

        def core_attention(self) -> type:
            """Softmax attention without its projections: TE's, or torch's where only that does what is asked."""
            return CoreAttentionBesideTE if why_torch else super().core_attention()

        def grouped_mlp_modules(
            self, moe_use_grouped_gemm: bool = True, moe_use_legacy_grouped_gemm: bool = False
        ) -> tuple[type, MLPSubmodules]:
            """TE's grouped layers, in experts that can keep SwiGLU's input in FP8."""
            from dsv3_megatron.model.layers.experts import TEGroupedExperts  # needs Transformer Engine

            _, layers = super().grouped_mlp_modules(moe_use_grouped_gemm, moe_use_legacy_grouped_gemm)
            return TEGroupedExperts, layers

        def activation_func(self) -> type:
            """SwiGLU, which can keep its input in FP8 and compute its output again."""
            return SwiGLU

    return TEBackend()


def backend_name(wanted: Literal["auto", "te", "torch"], device: torch.device) -> Literal["te", "torch"]:
    """Return the backend of a recipe's ``backend``. ``auto`` is te where TE and a GPU are, else torch.

    Raises: PackageError: ``te`` was asked for where it cannot run.
    """
    installed = find_spec("transformer_engine") is not None
    if wanted == "te" and not installed:
        raise PackageError(
            "backend = te needs transformer-engine, not installed here; pip install -e '.[gpu]', or set backend=torch"
        )
    if wanted == "te" and device.type not in transformer_engine.DEVICES:
        raise PackageError("backend = te needs a GPU, and there is none here; set backend=torch")
    return "te" if wanted == "te" or (wanted == "auto" and device.type == "cuda" and installed) else "torch"


def choose_backend(
    wanted: Literal["auto", "te", "torch"],
    device: torch.device,
    why_torch: Callable[[], str | None] = lambda: None,
) -> BackendSpecProvider:
    """Return the leaf modules of a recipe's ``backend``. Raises PackageError as :func:`backend_name`.

    ``why_torch``: asked for the te backend alone: why torch's attention is to serve there, or None.
    """
    return make_te_backend(why_torch()) if backend_name(wanted, device) == "te" else TorchBackend()
