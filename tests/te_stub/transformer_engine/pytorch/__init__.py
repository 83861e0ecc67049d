"""Parameters as Transformer Engine 2.x names and shapes them; whatever else is asked for is an empty class."""

import sys
import types

import torch

CALLS: list[tuple[str, dict]] = []


class _Module(torch.nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        CALLS.append((type(self).__name__, arguments))

    def _make(self, name, shape, arguments):
        device = arguments.get("device") or "cpu"
        dtype = arguments.get("params_dtype") or torch.float32
        setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))


class Linear(_Module):
    def __init__(self, in_features, out_features, **arguments):
        super().__init__(in_features=in_features, out_features=out_features, **arguments)
        self._make("weight", (out_features, in_features), arguments)
        assert not arguments.get("bias", True)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, **arguments):
        super().__init__(in_features, out_features, **arguments)
        self._make("layer_norm_weight", (in_features,), arguments)


class GroupedLinear(_Module):
    def __init__(self, num_gemms, in_features, out_features, **arguments):
        super().__init__(num_gemms=num_gemms, in_features=in_features, out_features=out_features, **arguments)
        for i in range(num_gemms):
            self._make(f"weight{i}", (out_features, in_features), arguments)


class RMSNorm(_Module):
    def __init__(self, hidden_size, **arguments):
        super().__init__(hidden_size=hidden_size, **arguments)
        self._make("weight", (hidden_size,), arguments)


class DotProductAttention(_Module):
    """Attention without parameters."""

    def __init__(self, num_attention_heads, kv_channels, **arguments):
        super().__init__(num_attention_heads=num_attention_heads, kv_channels=kv_channels, **arguments)


class _Anything(types.ModuleType):
    """A module in which every name is a class without behaviour."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"apply": None})
        setattr(self, name, made)
        return made


for _name in ("fp8", "distributed", "optimizers", "permutation", "cross_entropy", "cpp_extensions", "router", "ops",
              "float8_tensor", "attention", "cpu_offload", "tensor", "module", "module.base"):  # fmt: skip
    _full = f"{__name__}.{_name}"
    sys.modules[_full] = _Anything(_full)
    if "." not in _name:
        setattr(sys.modules[__name__], _name, sys.modules[_full])
common = types.SimpleNamespace(recipe=_Anything("recipe"))
Fp8Padding = Fp8Unpadding = type("Fp8Padding", (_Module,), {})
LayerNorm = RMSNorm
sys.modules[f"{__name__}.cpu_offload"].get_cpu_offload_context = lambda *a, **k: (None, None)
