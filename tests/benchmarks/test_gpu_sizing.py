"""The measuring recipe fits whatever GPU it finds, by the plan that a user would get for it."""

import functools

import pytest

from benchmarks.gpu_check.sizing import SHAPES, plan_of, sized
from launcher.command_line.compose import compose
from parallel.errors import DoesNotFitError

GIB = 2**30
NAMES = {16: "Tesla T4", 24: "NVIDIA GeForce RTX 4090", 32: "Tesla V100-SXM2-32GB", 40: "NVIDIA A100-PCIE-40GB",
         48: "NVIDIA L40S", 80: "NVIDIA H100 80GB HBM3", 141: "NVIDIA H200", 180: "NVIDIA B200"}  # fmt: skip


full = pytest.mark.full


@functools.cache
def words_for(gib):
    """The recipe for a GPU of so much memory: composing takes most of these tests' time."""
    return sized(gib * GIB, gpu=NAMES.get(gib, ""))


@pytest.mark.parametrize("gib", [gib if gib in (16, 80) else pytest.param(gib, marks=full) for gib in NAMES])
def test_the_plan_fits_the_memory_found(gib):
    for more in (("precision=bf16", "backend=te"), ("precision=fp8", "backend=te"), ("precision=fp8", "backend=torch")):
        plan = plan_of(compose([*words_for(gib), *more]))
        assert plan.recipe.cluster.memory == gib * GIB and plan.fits, more


@full
def test_more_memory_trains_no_smaller_model_and_every_shape_serves_some_gpu():
    used = [compose(list(words_for(gib))) for gib in NAMES]
    shapes = [(r.model.num_hidden_layers, r.model.n_routed_experts, r.data.sequence_length) for r in used]
    assert shapes == sorted(shapes)
    assert set(shapes) == {(s.layers, s.experts, s.sequence) for s in SHAPES}


def test_widths_are_the_published_models():
    model, published = (compose([*words]).model for words in (words_for(16), ["recipe=dsv3_671b"]))
    for width in ("hidden_size", "num_attention_heads", "qk_nope_head_dim", "v_head_dim", "moe_intermediate_size"):
        assert getattr(model, width) == getattr(published, width)


def test_a_share_of_the_peak_is_told_only_where_the_peak_is_known():
    assert compose(list(words_for(141))).cluster.peak_tflops["bf16"] == 989.5
    assert compose(list(words_for(40))).cluster.peak_tflops == {}


def test_what_is_too_small_is_refused_in_a_line():
    with pytest.raises(DoesNotFitError, match=r"memory = 8\.0 GiB is too little .* 16 GiB or more"):
        sized(8 * GIB)
