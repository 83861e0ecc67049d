"""What Transformer Engine and megatron-core ask of a GPU, answered as a Hopper would."""

from __future__ import annotations

import types

import torch

from dsv3_megatron.megatron.host import adapt_host
from testing.te.calls import record

_HOPPER = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, name="pretended H200", total_memory=1 << 37
)


def pretend_hopper() -> None:
    """Answer, after the project has adapted megatron-core to this machine: it asks whether CUDA is there."""
    adapt_host()
    torch.cuda.get_device_properties = lambda *a, **k: _HOPPER
    torch.cuda.get_device_capability = lambda *a, **k: (_HOPPER.major, _HOPPER.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda self: True)
    _answer_what_te_remembers()
    _take_unfused_attention()


def _answer_what_te_remembers() -> None:
    from transformer_engine.pytorch import distributed, quantization

    quantization._FP8_SUPPORT = quantization._FP8_BLOCK_SCALING_SUPPORT = (True, "")
    generator = torch.random.default_generator
    distributed._get_cuda_rng_state = lambda *a, **k: generator.get_state()
    distributed._set_cuda_rng_state = lambda state, *a, **k: generator.set_state(state)


def _take_unfused_attention() -> None:
    """Let attention be TE's unfused one, and note what TE would have taken on a Hopper."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    select = utils.get_attention_backend

    def unfused(params: object) -> tuple:
        try:
            chosen = str(select(params))
        except RuntimeError as error:  # cuDNN's answer is a compiled one (NotImplementedError), and needs a GPU
            chosen = str(error)
        record("attention", layout=params.qkv_layout, dtype=params.qkv_dtype, chosen=chosen,
               query_key=params.head_dim_qk, value=params.head_dim_v)  # fmt: skip
        return False, None, False, None, True, [False, False, True]

    utils.get_attention_backend = unfused
