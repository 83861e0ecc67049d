"""Modules with the parameters, shapes and calls of Transformer Engine 2.x, computing in high precision on any device.

CALLS holds (class, constructor arguments), FORWARDS (class, FP8 recipe in force or None); whatever else is asked for is
an empty class. Norm weights and layouts are TE's: LayerNormLinear norms its input first, GroupedLinear takes splits.
"""

import collections
import contextlib
import sys
import types

import torch
import torch.nn.functional as F

CALLS: list[tuple[str, dict]] = []
FORWARDS: list[tuple[str, str | None]] = []
INITS: list[tuple[str, str | None]] = []
_active: list[object] = []


@contextlib.contextmanager
def fp8_autocast(enabled=False, calibrating=False, fp8_recipe=None, fp8_group=None):
    """FP8 for the forwards inside, as TE means it; None as recipe would be TE's default, which nobody should want."""
    assert fp8_recipe is not None
    _active.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _active.pop()


@contextlib.contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    """Parameters made inside would be held in FP8."""
    INITS.append((recipe.name, preserve_high_precision_init_val))
    yield


def _recipe():
    return _active[-1].name if _active and _active[-1] is not None else None


class _Module(torch.nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        CALLS.append((type(self).__name__, arguments))
        self.arguments, self.owed, self.hooks = arguments, collections.deque(), []

    def _make(self, name, shape, arguments):
        device = arguments.get("device") or "cpu"
        dtype = arguments.get("params_dtype") or torch.float32
        weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        weight.skip_backward_post_hook = bool(arguments.get("delay_wgrad_compute")) and len(shape) > 1
        setattr(self, name, weight)

    def _note(self):
        FORWARDS.append((type(self).__name__, _recipe()))


class _Delayed(torch.autograd.Function):
    """X W^T whose backward leaves the weight gradient to ``backward_dw``, first in first out."""

    @staticmethod
    def forward(ctx, x, module, weights, splits):
        ctx.x, ctx.module, ctx.weights, ctx.splits = x.detach(), module, weights, splits
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(splits), weights)])

    @staticmethod
    def backward(ctx, grad):
        pairs = list(zip(grad.split(ctx.splits), ctx.x.split(ctx.splits)))
        ctx.module.owed.append(lambda: [dy.flatten(0, -2).t() @ x.flatten(0, -2) for dy, x in pairs])
        return torch.cat([dy @ w for (dy, _), w in zip(pairs, ctx.weights)]), None, None, None


class _Weighted(_Module):
    """What layers with weights share: the product, and TE's store of weight gradients."""

    save_original_input = False

    def _product(self, x, weights, splits):
        if not self.arguments.get("delay_wgrad_compute", False):
            return torch.cat([F.linear(part, w) for part, w in zip(x.split(splits), weights)])
        return _Delayed.apply(x, self, weights, splits)

    def register_wgrad_accumulation_and_reduce_hooks(self, hook):
        self.hooks.append(hook)

    def backward_dw(self):
        if not self.arguments.get("delay_wgrad_compute", False):
            return
        for weight, gradient in zip(self._weights(), self.owed.popleft()()):
            weight.grad = gradient
        for hook in self.hooks:
            hook()


class Linear(_Weighted):
    def __init__(self, in_features, out_features, **arguments):
        super().__init__(in_features=in_features, out_features=out_features, **arguments)
        self._make("weight", (out_features, in_features), arguments)
        assert not arguments.get("bias", True)

    def _weights(self):
        return [self.weight]

    def forward(self, x, is_first_microbatch=None):
        self._note()
        return self._product(x, self._weights(), [x.shape[0]])


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, **arguments):
        super().__init__(in_features, out_features, **arguments)
        self._make("layer_norm_weight", (in_features,), arguments)
        self._eps = arguments["eps"]

    def forward(self, x, is_first_microbatch=None):
        self._note()
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self._eps)
        return self._product(normed, self._weights(), [x.shape[0]])


class GroupedLinear(_Weighted):
    def __init__(self, num_gemms, in_features, out_features, **arguments):
        super().__init__(num_gemms=num_gemms, in_features=in_features, out_features=out_features, **arguments)
        for i in range(num_gemms):
            self._make(f"weight{i}", (out_features, in_features), arguments)

    def forward(self, x, m_splits, is_first_microbatch=None):
        self._note()
        if _recipe():
            assert all(count % 16 == 0 for count in m_splits), m_splits
        return self._product(x, self._weights(), m_splits)

    def _weights(self):
        return [getattr(self, f"weight{i}") for i in range(self.arguments["num_gemms"])]


class RMSNorm(_Module):
    def __init__(self, hidden_size, **arguments):
        super().__init__(hidden_size=hidden_size, **arguments)
        self._make("weight", (hidden_size,), arguments)
        self._eps = arguments["eps"]

    def forward(self, x):
        self._note()
        return F.rms_norm(x, x.shape[-1:], self.weight, self._eps)


class DotProductAttention(_Module):
    """Causal attention without parameters."""

    def __init__(self, num_attention_heads, kv_channels, softmax_scale=None, **arguments):
        super().__init__(num_attention_heads=num_attention_heads, kv_channels=kv_channels, **arguments)
        self._scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, **unused):
        self._note()
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self._scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class Fp8Padding(_Module):
    """Rows of zeros after every expert's, up to a multiple of 16."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__(num_gemms=num_gemms)

    def forward(self, x, m_splits):
        self._note()
        padded = [-(-count // 16) * 16 for count in m_splits]
        parts = [F.pad(part, (0, 0, 0, to - part.shape[0])) for part, to in zip(x.split(m_splits), padded)]
        return torch.cat(parts), padded


class Fp8Unpadding(_Module):
    """Takes the rows of zeros away again."""

    def __init__(self, num_gemms, align_size=None):
        super().__init__(num_gemms=num_gemms)

    def forward(self, x, m_splits):
        padded = [-(-count // 16) * 16 for count in m_splits]
        return torch.cat([part[:count] for part, count in zip(x.split(padded), m_splits)])


class _Anything(types.ModuleType):
    """A module in which every name is a class without behaviour."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__") or name == "get_workspace":  # gone from TE 2.11 on
            raise AttributeError(name)
        made = type(name, (), {"apply": None})
        setattr(self, name, made)
        return made


for _name in ("fp8", "distributed", "permutation", "cross_entropy", "cpp_extensions", "router", "ops",
              "float8_tensor", "attention", "cpu_offload", "tensor", "module", "module.base"):  # fmt: skip
    _full = f"{__name__}.{_name}"
    sys.modules[_full] = _Anything(_full)
    if "." not in _name:
        setattr(sys.modules[__name__], _name, sys.modules[_full])
# Optimizers and no multi-tensor kernels: megatron-core then uses its own functions for norms and scales.
_optimizers = types.ModuleType(f"{__name__}.optimizers")
_optimizers.FusedAdam = _optimizers.FusedSGD = torch.optim.Optimizer
sys.modules[_optimizers.__name__] = optimizers = _optimizers
from transformer_engine import common as common

LayerNorm = RMSNorm
sys.modules[f"{__name__}.cpu_offload"].get_cpu_offload_context = lambda *a, **k: (contextlib.nullcontext(), lambda x: x)
