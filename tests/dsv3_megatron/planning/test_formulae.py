"""The fast path says what the exact one finds: formulae against the real modules on fake tensors, at true widths."""

import pytest

from dsv3_megatron.planning.formulae import estimate_stages
from dsv3_megatron.planning.plan import make_plan
from launcher.compose import compose

SHORT = (
    "recipe=dsv3_671b",
    "model.num_hidden_layers=4",
    "model.first_k_dense_replace=1",
    "parallel.pipeline=2",
    "cluster.nodes=16",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.recompute=[norm,mla_up,moe_act]", "parallel.schedule=1f1b"),
    ],
)
def test_formulae_agree_with_the_exact_path(overrides):
    recipe = compose([*SHORT, *overrides])
    exact, fast = make_plan(recipe, 128), make_plan(recipe, 128, measure=estimate_stages)
    for one, other in zip(exact.stages, fast.stages):
        assert (one.parameters, one.expert_parameters, one.fp8_parameters, one.message) == (
            other.parameters,
            other.expert_parameters,
            other.fp8_parameters,
            other.message,
        )
        print(one, other, sep="\n")
        assert other.kept == pytest.approx(one.kept, rel=0.1)
    for one, other in zip(exact.ranks, fast.ranks):
        assert other.total_bytes == pytest.approx(one.total_bytes, rel=0.1)
    assert exact.step == fast.step
