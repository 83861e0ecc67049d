"""The te backend on Transformer Engine's own Python: it trains as the torch backend does, in every layout and setting.

Oracles: the torch backend, one process against many, and a setting that must change nothing against none. Memory that
nobody has written is NaN, and every parameter must have a gradient.
"""

import math

import pytest
import torch

from testing.lanes import InLanes, names_in_lanes
from testing.ranks import TE, run_ranks
from testing.training.on_te import FP8, WORDS, Training, difference, train, untrained

HELD = "precision.fp8.hold_weights=true"
TENSOR = tuple(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient"))
DELAYED = (*FP8, *TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high")
RECOMPUTATIONS = ("norm", "mla_up", "attention", "moe_act", "shared_experts", "mlp", "moe", "full")
PRECISIONS = {"fp32": WORDS, "bf16": (*WORDS, "precision=bf16"), "fp8": FP8}
ONE = {
    **{name: Training(words) for name, words in PRECISIONS.items()},
    "evaluated": Training(FP8, evaluate=True),
    "held": Training((*FP8, HELD)),
    "held, float32 moments": Training((*FP8, HELD, "precision.moments=fp32")),
    "float32 moments": Training((*FP8, "precision.moments=fp32")),
    "tensor": Training((*FP8, *TENSOR)),
    "delayed": Training(DELAYED, evaluate=True),
    **{name: Training((*FP8, f"parallel.recompute=[{name}]")) for name in RECOMPUTATIONS},
    "full in bf16": Training((*PRECISIONS["bf16"], "parallel.recompute=[full]")),
    **{f"{name} beside torch's attention": Training(PRECISIONS[name], unfused="no cuDNN") for name in PRECISIONS},
}
PIPELINES = {
    "1f1b": ("parallel.schedule=1f1b",),
    "interleaved": ("parallel.schedule=interleaved", "parallel.chunks=2"),
    "zb1p": ("parallel.schedule=zb1p",),
    "dualpipe": ("parallel.schedule=dualpipe",),
    "dualpipev": ("parallel.schedule=dualpipev",),
}
# What the published recipe asks for (recipes/recipe/dsv3_671b.yaml).
FLAGSHIP = (*FP8, HELD, *PIPELINES["dualpipe"], "parallel.pipeline=2", "parallel.recompute=[norm,mla_up,moe_act]")
TWO = {
    **{f"{name} {p}": Training((*PRECISIONS[p], "parallel.pipeline=2", *words))
       for name, words in PIPELINES.items() for p in ("fp32", "fp8")},
    "ep2": Training((*WORDS, "parallel.expert=2")),
    "tp2": Training((*WORDS, "parallel.tensor=2")),
    "tp2 ep2": Training((*WORDS, "parallel.tensor=2", "parallel.expert=2")),
    "expert tp2": Training((*WORDS, "parallel.expert_tensor=2")),
    "tp2 expert tp2": Training((*WORDS, "parallel.tensor=2", "parallel.expert_tensor=2")),
    "dp2 held": Training((*FP8, HELD)),
    "flagship": Training(FLAGSHIP),
    "flagship beside torch's attention": Training(FLAGSHIP, unfused="no cuDNN"),
    "cp2 beside torch's attention": Training((*WORDS, "parallel.context=2"), unfused="no cuDNN"),
}  # fmt: skip


BESIDE = [f"{name} beside torch's attention" for name in PRECISIONS]
FAST_ONE = ("fp32", "bf16", "fp8", "evaluated", "held", "delayed", "norm", "moe_act", "full", *BESIDE)
# Every schedule in one precision, every kind of layout.
FAST_PIPELINES = ("1f1b fp32", "interleaved fp8", "zb1p fp32", "dualpipe fp8", "dualpipev fp8")
FAST_TWO = (*FAST_PIPELINES, "tp2 ep2", "dp2 held", "flagship", *(name for name in TWO if "beside" in name))


@pytest.fixture(scope="module")
def one():
    """Trainings on one rank, by name."""
    return InLanes(
        ONE, lambda cases: [found for (found,) in run_ranks(1, train, list(cases.values()), preload=TE)], *FAST_ONE
    )


@pytest.fixture(scope="module")
def two():
    """Trainings on two ranks, by name: what each rank found."""
    return InLanes(TWO, lambda cases: run_ranks(2, train, list(cases.values()), preload=TE), *FAST_TWO)


@pytest.fixture(scope="module")
def on_torch():
    """Trainings of the torch backend, by name."""
    words = {**PRECISIONS, "tensor": ONE["tensor"].overrides, "delayed": DELAYED}
    cases = {name: Training((*given, "backend=torch")) for name, given in words.items()}
    return InLanes(
        cases, lambda some: [found for (found,) in run_ranks(1, train, list(some.values()))], "fp32", "fp8", "delayed"
    )


def test_float32_trains_as_on_the_torch_backend(one, on_torch):
    assert one["fp32"]["losses"] == pytest.approx(on_torch["fp32"]["losses"], rel=1e-6)
    assert one["fp32"]["mtp"] == pytest.approx(on_torch["fp32"]["mtp"], rel=1e-6)
    assert one["fp32"]["norms"] == pytest.approx(on_torch["fp32"]["norms"], rel=1e-5)


@pytest.mark.parametrize("name", names_in_lanes(["bf16", "fp8", "tensor", "delayed"], "fp8", "delayed"))
def test_low_precision_follows_the_torch_backend(one, on_torch, name):
    assert one[name]["losses"] == pytest.approx(on_torch[name]["losses"], rel=3e-3)
    assert one[name]["losses"] != one["fp32"]["losses"]
    assert one[name]["norms"] == pytest.approx(on_torch[name]["norms"], rel=0.05)


@pytest.mark.parametrize("name", PRECISIONS)
def test_torchs_attention_serves_where_te_has_no_fused_one(one, name):
    own, beside = one[name], one[f"{name} beside torch's attention"]
    assert (own["attention"], beside["attention"]) == ({"TEDotProductAttention"}, {"CoreAttentionBesideTE"})
    assert beside["losses"] == pytest.approx(own["losses"], rel=1e-6 if name == "fp32" else 3e-3)
    assert beside["norms"] == pytest.approx(own["norms"], rel=1e-5 if name == "fp32" else 0.05)
    assert name != "fp32" or difference(beside, own) < 1e-4  # TE's unfused one rounds probabilities to BF16
    assert beside["backend"].endswith("torch's fused attention (Transformer Engine has none here: no cuDNN)")
    assert "attention" not in own["backend"]


def test_torchs_attention_among_te_layers_serves_every_layout(one, two):
    whole, split = one["fp32"], two["cp2 beside torch's attention"]
    assert split[0]["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert difference(split[0], whole) < 1e-4
    own, beside = two["flagship"], two["flagship beside torch's attention"]
    assert beside[0]["losses"] == pytest.approx(own[0]["losses"], rel=1e-3)


def test_weights_are_quantised_in_every_step(one):
    first, *later = one["fp8"]["quantised"]
    assert first and later == [first] * len(later)
    # Also where an evaluation went before, which leaves out the MTP modules.
    assert one["evaluated"]["quantised"] == one["fp8"]["quantised"]
    assert one["evaluated"]["losses"] == one["fp8"]["losses"]


def test_an_evaluation_reads_the_weights_of_now(one):
    assert one["evaluated"]["held_out"] == one["evaluated"]["losses"]  # of the same batches, before the step


@pytest.mark.parametrize("name", names_in_lanes(ONE, *FAST_ONE))
def test_every_parameter_has_a_gradient(one, name):
    assert untrained(one[name]) == []


@pytest.mark.parametrize("name", names_in_lanes(TWO, *FAST_TWO))
def test_every_parameter_has_a_gradient_in_every_layout(two, name):
    assert [untrained(found) for found in two[name]] == [[], []]


@pytest.mark.parametrize("name", names_in_lanes(RECOMPUTATIONS, *FAST_ONE))
def test_no_recomputation_changes_a_gradient(one, name):
    assert one[name]["losses"] == one["fp8"]["losses"] and one[name]["norms"] == one["fp8"]["norms"]
    assert difference(one[name], one["fp8"]) == 0


@pytest.mark.full
def test_recomputing_whole_layers_changes_nothing_in_bf16(one):
    assert difference(one["full in bf16"], one["bf16"]) == 0


@pytest.mark.parametrize(
    "name", names_in_lanes([f"{name} {p}" for name in PIPELINES for p in ("fp32", "fp8")], *FAST_PIPELINES)
)
def test_every_schedule_trains_as_one_process(one, two, name):
    precision = name.split()[1]
    tolerance, expected = {"fp32": 1e-6, "fp8": 1e-3}[precision], one[precision]
    for found in two[name]:
        assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
        assert found["norms"] == pytest.approx(expected["norms"], rel=max(5 * tolerance, 1e-5))


LAYOUTS = ("ep2", "tp2", "tp2 ep2", "expert tp2", "tp2 expert tp2")


@pytest.mark.parametrize("layout", names_in_lanes(LAYOUTS, *FAST_TWO))
def test_every_layout_has_the_gradient_norm_of_one_process(one, two, layout):
    for found in two[layout]:
        assert found["losses"] == pytest.approx(one["fp32"]["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(one["fp32"]["norms"], rel=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp8", "held"])
def test_weight_gradients_are_added_in_float32(one, name):
    products = one[name]["wgrads"]
    assert products and {found["dtype"] for found in products} == {torch.float32}
    assert any(found["accumulate"] for found in products)


@pytest.mark.parametrize("name", names_in_lanes([f"{name} fp8" for name in PIPELINES], *FAST_PIPELINES))
def test_weight_gradients_are_added_in_float32_under_every_schedule(two, name):
    products = [product for found in two[name] for product in found["wgrads"]]
    assert {product["dtype"] for product in products} == {torch.float32}


def test_weights_held_in_fp8_train_as_those_that_are_not(one, two):
    # To the last digit: the float32 masters begin with the weights that were drawn, not with what FP8 left of them.
    assert one["held"]["losses"] == one["fp8"]["losses"] and difference(one["held"], one["fp8"]) == 0
    assert sum(one["held"]["quantised"]) == 0
    for found in two["dp2 held"]:
        assert found["losses"] == pytest.approx(one["fp8"]["losses"], rel=1e-7)


@pytest.mark.full
def test_moments_in_float32_are_those_of_weights_that_are_not_held(one):
    assert one["held, float32 moments"]["losses"] == one["float32 moments"]["losses"]


def test_the_settings_of_the_published_recipe_train(one, two):
    for found in two["flagship"]:
        assert found["losses"] == two["dualpipe fp8"][0]["losses"]
        assert all(math.isfinite(norm) for norm in found["norms"])
