"""Leaf modules of the torch backend against slow, plain references."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

from dsv3_megatron.model.backend import TorchBackend, choose_backend
from dsv3_megatron.model.config import RECOMPUTE, transformer_config
from dsv3_megatron.model.layers.attention import CoreAttention
from dsv3_megatron.model.layers.experts import DownLinear, GateUpLinear
from dsv3_megatron.model.layers.norm import RMSNorm
from dsv3_megatron.model.stage import build_stage
from parallel.errors import PackageError
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.training.tiny import small_recipe


def settings(**values):
    base = {
        "params_dtype": torch.float32,
        "sequence_parallel": False,
        "perform_initialization": True,
        "delay_wgrad_compute": False,
        "attention_dropout": 0.0,
    }
    return SimpleNamespace(**base | values)


def grouped(kind, groups, config=None, experts=4, width=(8, 12)):
    return kind(experts, *width, config=config or settings(), init_method=torch.nn.init.normal_, pg_collection=groups)


@pytest.mark.parametrize("tokens", [[3, 5, 2, 4], [0, 7, 0, 1], [9, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("kind", [GateUpLinear, DownLinear])
def test_grouped_experts_equal_a_loop_over_experts(kind, tokens, one_process):
    torch.manual_seed(0)
    layer, total = grouped(kind, one_process), sum(tokens)
    x = torch.randn(total, 8, requires_grad=True)
    out, _ = layer(x, tokens)
    out.backward(direction := torch.randn_like(out))

    slow_x, slow_weight = x.detach().clone().requires_grad_(), layer.weight.detach().clone().requires_grad_()
    pieces = [part @ weight.t() for part, weight in zip(slow_x.split(tokens), slow_weight)]
    torch.cat(pieces).backward(direction)
    torch.testing.assert_close(out, torch.cat(pieces))
    torch.testing.assert_close(x.grad, slow_x.grad)
    torch.testing.assert_close(layer.weight.grad, slow_weight.grad)


def test_grouped_experts_take_an_expanded_gradient(one_process):
    layer = grouped(GateUpLinear, one_process)
    layer(torch.randn(8, 8), [2, 2, 2, 2])[0].sum().backward()  # the gradient of a sum has zero strides
    assert layer.weight.grad.isfinite().all()


def test_delayed_weight_gradients_equal_ordinary_ones(one_process):
    recipe = small_recipe()
    model, tokens = recipe.model, torch.randint(0, 256, (2, 33))

    def gradients(delayed):
        torch.manual_seed(0)
        config = transformer_config(model, ParallelSettings(), Layout())
        module = build_stage(
            config, model, TorchBackend(), stage=0, layers_of_stages=(4,), sequence_length=32, groups=one_process
        )
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.05)
        module.config.delay_wgrad_compute = delayed
        losses = module(tokens[:, :-1], torch.arange(32).expand(2, -1), None, labels=tokens[:, 1:])
        losses.sum().backward()
        deferred = [
            m for m in module.modules() if hasattr(m, "backward_dw") and len(getattr(m, "weight_gradients", ()))
        ]
        before = sum(p.grad is None for p in module.parameters())
        while any(len(m.weight_gradients) for m in deferred):
            for m in deferred:
                m.backward_dw()
        return {n: p.grad for n, p in module.named_parameters()}, len(deferred), before

    plain, none_deferred, _ = gradients(False)
    split, deferred, missing = gradients(True)
    assert none_deferred == 0 and deferred > 20 and missing == deferred
    for name, gradient in plain.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_recomputing_one_part_recomputes_no_other():
    for name in ("moe_act", "norm", "mla_up"):
        config = transformer_config(small_recipe().model, ParallelSettings(recompute=(name,)), Layout())
        assert config.recompute_modules == [RECOMPUTE[name]]


def test_recomputing_whole_layers_takes_in_every_part():
    config = transformer_config(small_recipe().model, ParallelSettings(recompute=("full", "moe_act")), Layout())
    assert config.recompute_granularity == "full"


def plain_attention(query, key, value, scale):
    """Return softmax attention [S, B, H, V] by matrices."""
    scores = torch.einsum("sbhq,tbhq->bhst", query, key) * scale
    scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhst,tbhv->sbhv", scores.softmax(-1), value)


def test_core_attention_equals_plain_softmax_with_unequal_widths(one_process):
    attention = CoreAttention(settings(), 1, None, "self", softmax_scale=0.3, pg_collection=one_process)
    query, key, value = torch.randn(12, 2, 3, 8), torch.randn(12, 2, 3, 8), torch.randn(12, 2, 3, 5)
    torch.testing.assert_close(attention(query, key, value), plain_attention(query, key, value, 0.3).flatten(2))


def test_packed_documents_attend_to_themselves_only(one_process):
    attention = CoreAttention(settings(), 1, None, "self", softmax_scale=0.3, pg_collection=one_process)
    query, key, value = torch.randn(12, 3, 8), torch.randn(12, 3, 8), torch.randn(12, 3, 5)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 7, 8, 12], dtype=torch.int32))
    out = attention(query, key, value, packed_seq_params=packed)
    for start, end in ((0, 7), (7, 8), (8, 12)):
        q, k, v = (x[start:end].unsqueeze(1) for x in (query, key, value))
        torch.testing.assert_close(out[start:end], plain_attention(q, k, v, 0.3).squeeze(1))


def test_packed_documents_through_the_whole_model_equal_documents_alone(one_process):
    recipe = small_recipe("model.num_nextn_predict_layers=0")
    config = transformer_config(recipe.model, ParallelSettings(), Layout())
    module = build_stage(
        config, recipe.model, TorchBackend(), stage=0, layers_of_stages=(4,), sequence_length=32, groups=one_process
    ).eval()
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tokens, cut = torch.randint(0, 256, (1, 32)), 20
    bounds = torch.tensor([0, cut, 32], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=cut, max_seqlen_kv=cut
    )
    with torch.no_grad():
        together = module(tokens, torch.arange(32)[None], None, packed_seq_params=packed)
        alone = [module(t, torch.arange(t.shape[1])[None], None) for t in (tokens[:, :cut], tokens[:, cut:])]
        crossing = module(tokens, torch.arange(32)[None], None)
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)
    assert (crossing[:, cut:] - together[:, cut:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_its_formula_in_float32(dtype):
    norm = RMSNorm(settings(params_dtype=dtype), 16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 16, dtype=dtype)
    wide = x.float()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.float()
    torch.testing.assert_close(norm(x), expected.to(dtype))


def test_asking_for_transformer_engine_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(PackageError, match="set backend=torch"):
        choose_backend("te", torch.device("cpu"))


def test_the_gradient_of_a_gated_layer_reaches_both_halves(one_process):
    layer = grouped(GateUpLinear, one_process)
    gate, up = layer(torch.randn(8, 8), [2, 2, 2, 2])[0].chunk(2, -1)
    (F.silu(gate) * up).sum().backward()
    assert (layer.weight.grad.abs().sum((0, 2)) > 0).all()
