"""show=optimizer: every parameter of the model as built, by the names of checkpoints, and what is kept of it."""

import json
from math import prod

import pytest

from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.model.costs import count_parameters
from launcher.command_line.compose import compose
from launcher.command_line.recipe_files import options
from launcher.plan import main
from parallel.errors import RecipeError
from testing.training.tiny import SMALL

MUON = (*SMALL, "optim.name=muon")


def shown(capsys, *words):
    """Return what the command prints as JSON."""
    assert main([*words, "show=optimizer", "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def row(found, end):
    """Return the only kind of row whose name ends so."""
    rows = [each for each in found["parameters"] if each["name"].endswith(end)]
    assert len({json.dumps({**each, "name": ""}) for each in rows}) == 1, end
    return rows[0]


@pytest.mark.parametrize("model", options("model"))
def test_every_parameter_of_every_model_is_there_under_its_name_and_shape(capsys, model):
    words = ["recipe=dsv3_tiny", f"model={model}", "parallel=single", "optim.name=muon"]
    settings = compose(words).model
    words.append(f"model.num_hidden_layers={settings.first_k_dense_replace + 2}")
    settings = compose(words).model
    found = shown(capsys, *words)
    shapes = {each["name"]: tuple(each["shape"]) for each in found["parameters"]}
    assert shapes == {key: shape for key, shape in our_shapes(settings).items() if not key.endswith("expert_bias")}
    counts = count_parameters(settings)
    by = {name: total["parameters"] for name, total in found["totals"].items()}
    assert by["muon"] + by["adamw"] == counts.main + counts.mtp and by["frozen"] == 0
    vectors = sum(prod(shape) for shape in shapes.values() if len(shape) == 1)
    assert by["adamw"] == 2 * counts.embedding + vectors


def test_matrices_and_states_are_those_of_the_rules(capsys):
    found = shown(capsys, *MUON, "precision=bf16", "optim.muon.key_value=parts", "optim.muon.router=adamw")
    experts = row(found, "experts.experts.linear_fc1.weight")
    assert experts["updated_by"] == "muon" and experts["matrices"] == [{"count": 16, "shape": [32, 64]}]
    assert experts["states"] == {"momentum_buffer": "bf16", "master": "fp32"}
    assert experts["state_bytes"] == 6 * prod(experts["shape"])
    assert row(found, "kv_up_proj.weight")["matrices"] == [{"count": 2, "shape": [64, 16]}]
    router = row(found, "router.weight")
    assert (router["updated_by"], router["why"]) == ("adamw", "gate; optim.muon.router = adamw")
    assert router["states"] == {"exp_avg": "bf16", "exp_avg_sq": "bf16", "master": "fp32"}
    assert found["totals"]["muon"]["state_bytes"] == 6 * found["totals"]["muon"]["parameters"]
    assert found["totals"]["adamw"]["state_bytes"] == 8 * found["totals"]["adamw"]["parameters"]


def test_what_is_frozen_is_said_to_be(capsys):
    words = (*MUON, "model.num_hidden_layers=4", "model.freeze=[experts,layers.1]", "run.start_from=there")
    found = shown(capsys, *words)
    frozen = {each["name"] for each in found["parameters"] if each["updated_by"] == "frozen"}
    experts = {each["name"] for each in found["parameters"] if ".experts.experts." in each["name"]}
    assert experts < frozen and all(".layers.1." in name or name in experts for name in frozen)
    assert found["totals"]["frozen"]["state_bytes"] == 0
    assert main([*words, "show=optimizer"]) == 0
    text = capsys.readouterr().out
    assert "frozen: model.freeze" in text and " 0,2-3 " in text and "momentum fp32" in text


def test_adamw_has_its_table_too(capsys):
    found = shown(capsys, *SMALL)
    assert {each["updated_by"] for each in found["parameters"]} == {"adamw"}
    assert {each["why"] for each in found["parameters"]} == {"optim.name = adamw"}
    assert found["totals"]["muon"] == {"parameters": 0, "matrices": 0, "state_bytes": 0}
    with pytest.raises(RecipeError, match="top has no effect beside show=optimizer"):
        main([*SMALL, "show=optimizer", "top=3"])
