"""``model.freeze``: what its names stand for, what it refuses, and what it leaves of a step."""

import pytest
import torch

from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.model.freeze import PARTS, is_frozen, part_of
from parallel.errors import RecipeError
from testing.ranks import run_ranks
from testing.training.tiny import Case, small_recipe, train_rank

LAYERS = ("model.num_hidden_layers=4", "optim.global_batch=4", "optim.micro_batch=1", "data.sequence_length=16")


def frozen_names(*freeze):
    return {name for name in our_shapes(small_recipe(*LAYERS).model) if is_frozen(freeze, name)}


def test_every_parameter_is_of_one_part_and_every_part_has_some():
    names = our_shapes(small_recipe(*LAYERS).model)
    assert {part_of(name) for name in names} == {*PARTS, "mtp"}
    assert [name for name in names if part_of(name) == "mtp"] == ["mtp.layers.0.eh_proj.weight"]
    assert frozen_names(*PARTS) == names.keys() - {"mtp.layers.0.eh_proj.weight"}


EXPERTS = ("decoder.layers.1.mlp.experts.", "mtp.layers.0.transformer_layer.mlp.experts.")
ROUTER = ("decoder.layers.1.mlp.router.weight", "decoder.layers.1.mlp.router.expert_bias")
NORMS = ("decoder.final_layernorm.", "mtp.layers.0.enorm.", "mtp.layers.0.hnorm.", "decoder.layers.0.self_attention.q_")


@pytest.mark.parametrize(
    ("freeze", "some", "others"),
    [
        ("layers.1-2", ("decoder.layers.1.", "decoder.layers.2."), ("decoder.layers.0.", "decoder.layers.3.", "mtp.")),
        ("layers.3", ("decoder.layers.3.",), ("mtp.layers.", "embedding.", "decoder.final_layernorm.")),
        ("mtp", ("mtp.",), ("decoder.",)),
        ("experts", EXPERTS, (".router.", "shared_experts")),
        ("router", ROUTER, ("attention", "experts.")),
        ("dense", ("decoder.layers.0.mlp.",), ("decoder.layers.1.mlp.", "shared_experts")),
        ("norms", NORMS, ("linear_", "experts")),
    ],
)
def test_a_name_stands_for_what_it_says(freeze, some, others):
    found = frozen_names(freeze)
    assert all(any(name.startswith(start) for name in found) for start in some)
    assert not [name for name in found if any(other in name for other in others)]


def test_gains_that_transformer_engine_fuses_into_linear_layers_are_norms():
    for name in ("self_attention.linear_q_up_proj.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"):
        assert part_of(f"decoder.layers.0.{name}") == "norms"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.freeze=[expert]",), "names 'expert', which is no part of the model; use some of embedding,"),
        (("model.freeze=[layers.2-4]",), "names 'layers.2-4', but the model's layers are 0 to 3; "),
        (("model.freeze=[layers.3-2]",), "names 'layers.3-2', but the model's layers are 0 to 3; "),
        (("model.freeze=[layers.]",), "names 'layers.', which is no part"),
        (("model.freeze=[mtp]", "model.num_nextn_predict_layers=0"), "'mtp', of which this model has none; leave it"),
        (
            ("model.freeze=[shared_experts]", "model.n_shared_experts=0"),
            "'shared_experts', of which this model has none",
        ),
        (("model.freeze=[dense]", "model.first_k_dense_replace=0"), "'dense', of which this model has none"),
        (("model.freeze=[embedding,head,norms,layers.0-3,mtp]",), r"= \[.*\] freezes every parameter; leave something"),
        (
            ("model.freeze=[experts]", "precision=fp8", "precision.fp8.hold_weights=true", "backend=te"),
            r"= \['experts'\] cannot go with precision.fp8.hold_weights = true, .*; set hold_weights=false",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words, said):
    with pytest.raises(RecipeError, match=f"model.freeze.*{said}") as refused:
        small_recipe(*LAYERS, *words)
    assert "\n" not in str(refused.value)


def test_all_but_one_part_can_be_frozen():
    for kept in PARTS:
        small_recipe(*LAYERS, f"model.freeze=[{','.join(part for part in PARTS if part != kept)},mtp]")


CASES = {
    "embedding and the first layers": "[embedding,layers.0-1]",
    "experts": "[experts]",
    "router": "[router]",
    "norms, attention": "[norms,attention]",
    "all but the head": "[embedding,norms,layers.0-3,mtp]",
    "all but experts": "[embedding,head,attention,dense,shared_experts,router,norms]",
    "all but the embedding": "[head,norms,layers.0-3,mtp]",
}


# A weight that is in no gradient buffer lies at another address, on which the last bit of a CPU's products depends.
@pytest.mark.parametrize(
    ("precision", "recompute", "near"),
    [
        ("fp32", "[]", 1e-5),
        ("fp32", "[norm,mla_up,moe_act]", 1e-5),
        ("fp32", "[full]", 1e-5),
        ("bf16", "[norm]", 0.05),
        ("fp8", "[]", 0.05),
    ],
)
def test_what_is_trained_has_the_gradients_of_a_run_without_freezing(tmp_path, precision, recompute, near):
    words = (*LAYERS, f"precision={precision}", f"parallel.recompute={recompute}")
    paths = {name: str(tmp_path / f"{name}.pt") for name in CASES}
    asked = [
        Case(words, steps=0, save_to=str(tmp_path / "start.pt")),
        Case(words, steps=1, save_to=str(tmp_path / "free.pt")),
        *(Case((*words, f"model.freeze={f}"), steps=2, save_to=paths[n]) for n, f in CASES.items()),
    ]
    _, free, *others = run_ranks(1, train_rank, asked)
    start, whole = torch.load(tmp_path / "start.pt"), torch.load(tmp_path / "free.pt")
    for (name, freeze), (found,) in zip(CASES.items(), others):
        parts, mine = freeze.strip("[]").split(","), torch.load(paths[name])
        trained = {key for key in whole["weights"] if not is_frozen(parts, key)}
        for gradients in mine["gradients"]:
            assert gradients.keys() == trained, name
        for key, expected in whole["gradients"][0].items():
            if key in trained:
                error = (mine["gradients"][0][key] - expected).norm() / expected.norm()
                assert error < near and mine["gradients"][1][key].any(), (name, key, error)
            same = torch.equal(mine["weights"][key], start["weights"][key])
            assert same if key not in trained else precision != "fp32" or not same, (
                name,
                key,
            )  # BF16 hides small steps
        first, loss = found["results"][0], free[0]["results"][0].lm_loss
        assert first.lm_loss == pytest.approx(loss, rel=near / 10)
        norm = torch.stack([mine["gradients"][0][key].double().norm() for key in trained]).norm()
        assert first.grad_norm == pytest.approx(norm.item(), rel=1e-6), name
        for key, bias in mine["biases"].items():  # they begin with zeros
            assert bool(bias.any()) is not is_frozen(parts, key.removeprefix("bias.")), (name, key)
