"""What FP8 changes outside of products: cached activations and their live bytes, and tokens sent to experts."""

import gc
from contextlib import contextmanager

import pytest
import torch

from dsv3_megatron.model.layers.attention import CoreAttention
from dsv3_megatron.model.layers.dispatch import Fp8AllToAllDispatcher, _AllToAll
from dsv3_megatron.model.layers.swiglu import SwiGLU, swiglu
from dsv3_megatron.model.stage import forward_logits
from dsv3_megatron.precision.e5m6 import quantise_e5m6
from dsv3_megatron.precision.saved import saved_of
from dsv3_megatron.precision.tiles import quantise_dequantise
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.run import processes
from launcher.command_line.compose import compose
from parallel.world import World


def gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def cached():
    module = SwiGLU()
    module.cache_in_fp8 = True
    return module


def test_swiglu_backward_is_that_of_its_cached_input():
    torch.manual_seed(0)
    gate_up, probs = torch.randn(7, 2 * 96), torch.rand(7, 1)
    out, found = gradients(cached(), gate_up, probs)
    assert torch.equal(out, swiglu(gate_up, probs))  # forward reads the input itself
    _, expected = gradients(swiglu, quantise_dequantise(gate_up, (1, 128)), probs)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighed", [False, True])
def test_swiglu_in_high_precision_keeps_its_input_alone(dtype, weighed):
    torch.manual_seed(0)
    inputs = [torch.randn(7, 2 * 96, dtype=dtype), *([torch.rand(7, 1)] if weighed else [])]
    out, found = gradients(SwiGLU(), *inputs)
    plain, expected = gradients(swiglu, *inputs)
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(found, expected))
    gate_up, *probs = (x.clone().requires_grad_() for x in inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda _: None):
        saved = []
        SwiGLU()(gate_up, *probs)
    assert saved == [x.data_ptr() for x in (gate_up, *probs)]


def test_the_linear_after_swiglu_is_offered_the_cache():
    gate_up = torch.randn(5, 2 * 64, requires_grad=True)
    out = cached()(gate_up)
    torch.testing.assert_close(
        saved_of(out).dequantise(), swiglu(quantise_dequantise(gate_up.detach(), (1, 128))), rtol=1e-6, atol=1e-6
    )
    assert saved_of(SwiGLU()(gate_up)) is None
    with torch.no_grad():
        assert saved_of(cached()(gate_up)) is None


class Config:
    attention_dropout = 0.0


def test_one_copy_in_high_precision_changes_no_gradient():
    torch.manual_seed(0)
    query, key, value = torch.randn(24, 2, 3, 48), torch.randn(24, 2, 3, 48), torch.randn(24, 2, 3, 32)
    attention = CoreAttention(Config(), 1, None, "self")
    plain, exact = gradients(attention, query, key, value)
    attention.output_cache = "once"
    out, found = gradients(attention, query, key, value)
    assert torch.equal(out, plain) and all(torch.equal(a, b) for a, b in zip(found, exact))
    kept = saved_of(attention(query.clone().requires_grad_(), key, value))
    assert torch.equal(kept.dequantise(), plain)


@pytest.mark.parametrize("widths", [(32, 32), (48, 32)])  # of q and k, of v: the second pads v
def test_attention_backward_reads_the_e5m6_copy_of_its_output(widths):
    torch.manual_seed(0)
    qk, v = widths
    query, key, value = torch.randn(24, 2, 3, qk), torch.randn(24, 2, 3, qk), torch.randn(24, 2, 3, v)
    attention = CoreAttention(Config(), 1, None, "self")
    plain, exact = gradients(attention, query, key, value)
    attention.output_cache = "e5m6"
    out, found = gradients(attention, query, key, value)
    assert torch.equal(out, plain)
    errors = [((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in zip(found, exact)]
    assert 1e-6 < max(errors) < 0.02, errors  # the copy was read, and it is six mantissa bits fine
    leaf = query.clone().requires_grad_()
    kept = saved_of(attention(leaf, key, value))
    assert torch.equal(kept.dequantise(), quantise_e5m6(plain).dequantise())


def live_bytes(dtype=None):
    """Return the bytes of every tensor there is (of that dtype), storages counted once. What autograd saves shows as
    Python objects inside ``visible_saves``."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and dtype in (None, thing.dtype):
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def visible_saves():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: [t], lambda box: box[0])


@contextmanager
def tiny_model(*words):
    """The whole tiny model without MTP, for as long as the block lasts."""
    recipe = compose(["recipe=dsv3_tiny", "model.num_nextn_predict_layers=0", "data=synthetic", *words])
    torch.set_num_threads(1)
    with processes(World(0, 1, 0), torch.device("cpu")):
        yield build_parts(recipe, recipe.layout(1), torch.device("cpu")).whole_model


def kept_for_backward(chunk, dtype=None):
    """Return the bytes (of that dtype) that a forward of 256 tokens leaves live."""
    tokens = torch.arange(256).view(1, 256)
    forward_logits(chunk, tokens)  # weights are quantised once, before what is measured
    before = live_bytes(dtype)
    with visible_saves():
        losses = chunk(tokens, torch.arange(256).view(1, 256), None, labels=tokens)
        kept = live_bytes(dtype) - before
    losses.sum().backward()
    return kept


def test_the_caches_save_the_bytes_they_should():
    kept = {}
    for name, words in {
        "bf16": ["precision=bf16"],
        "products": ["precision=fp8", *(f"precision.fp8.{c}=high" for c in ("swiglu_cache", "attention_output_cache"))],
        "swiglu": ["precision=fp8", "precision.fp8.attention_output_cache=high"],
        "both": ["precision=fp8"],
    }.items():
        with tiny_model(*words) as chunk:
            kept[name] = kept_for_backward(chunk)
    assert kept["both"] < kept["swiglu"] < kept["products"] < kept["bf16"], kept
    # Rows times widths of SwiGLU's output: the dense layer's, the shared experts', four routed experts' of each token.
    cells = 256 * 384 + 3 * 256 * 64 + 3 * 4 * 256 * 64
    # Without the cache gate | up are kept in BF16, the linear its input in FP8: 5 bytes a cell. With it: gate | up
    # in FP8, 2 bytes and scales. (The linear's copy of the routed experts' is padded to whole tiles besides.)
    assert kept["products"] - kept["swiglu"] > 2.8 * cells, kept
    # The attention's output [4 layers, 256 tokens, 4 heads], padded to the queries' 48 and in BF16, and the linear's
    # FP8 copy of its 32 become 1.5 bytes of 32.
    saved = 4 * 256 * 4 * (48 * 2 + 32 - 32 * 1.5)
    assert kept["swiglu"] - kept["both"] == pytest.approx(saved, rel=0.1), kept


RECOMPUTED = "precision.fp8.swiglu_cache=high"  # an FP8 cache computes SwiGLU again without being asked


def test_what_recomputation_brings_back_is_not_kept_in_fp8_besides():
    kept = {}
    for name in ("", "norm", "moe_act"):
        with tiny_model("precision=fp8", RECOMPUTED, f"parallel.recompute=[{name}]") as chunk:
            kept[name] = kept_for_backward(chunk, torch.float8_e4m3fn)
    tokens, hidden = 256, 128
    # Of norms' outputs: two down-projections in each of four layers, three shared experts' and the dense layer's first.
    assert kept[""] - kept["norm"] == (2 * 4 + 3 + 1) * tokens * hidden, kept
    # Of SwiGLU's outputs: four experts a token in three layers, 64 wide; an expert's tokens fill whole tiles of 128.
    assert kept[""] - kept["moe_act"] >= 3 * 4 * tokens * 64, kept


@pytest.mark.parametrize("later", [False, True])
def test_recomputation_in_fp8_changes_no_gradient(later):
    found = {}
    for names in ("", "norm,moe_act"):
        with tiny_model("precision=fp8", RECOMPUTED, f"parallel.recompute=[{names}]") as chunk:
            chunk.config.delay_wgrad_compute = later
            tokens = torch.arange(256).view(1, 256)
            chunk(tokens, torch.arange(256).view(1, 256), None, labels=tokens).sum().backward()
            for module in chunk.modules():
                if hasattr(module, "backward_dw") and hasattr(module, "products"):
                    module.backward_dw()
            found[names] = {name: p.main_grad.clone() for name, p in chunk.named_parameters()}
    for name, plain in found[""].items():
        assert plain.any() and torch.equal(found["norm,moe_act"][name], plain), name


def test_tokens_travel_in_fp8_and_results_do_not(one_process):
    torch.manual_seed(0)
    x, group = torch.randn(40, 300), one_process.ep
    cut = quantise_dequantise(x, (1, 128))
    dispatch = lambda t: _AllToAll.apply(t, group, None, None, True, False)  # noqa: E731
    combine = lambda t: _AllToAll.apply(t, group, None, None, False, True)  # noqa: E731
    out, (grad,) = gradients(dispatch, x)
    assert torch.equal(out, cut) and torch.equal(grad, torch.linspace(-1, 1, x.numel()).view_as(x))
    out, (grad,) = gradients(combine, x)
    sent = torch.linspace(-1, 1, x.numel()).view_as(x)
    assert torch.equal(out, x) and torch.equal(grad, quantise_dequantise(sent, (1, 128)))


def test_no_token_is_no_trouble(one_process):
    empty = torch.zeros(0, 300)
    assert _AllToAll.apply(empty, one_process.ep, None, None, True, False).shape == (0, 300)


@pytest.mark.parametrize(("dispatch", "expected"), [("e4m3", True), ("high", False)])
def test_the_policy_decides_on_dispatch(dispatch, expected):
    with tiny_model("precision=fp8", f"precision.fp8.dispatch={dispatch}") as chunk:
        dispatchers = [m.token_dispatcher for m in chunk.modules() if hasattr(m, "token_dispatcher")]
    assert [isinstance(d, Fp8AllToAllDispatcher) for d in dispatchers] == [expected] * 3
