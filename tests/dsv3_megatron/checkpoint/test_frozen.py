"""Checkpoints of runs that train a part of the model: whole, loaded in any layout, and by runs that train another."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dsv3_megatron.checkpoint.boxes import even_runs
from dsv3_megatron.checkpoint.find import Found
from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.checkpoint.load import _changed_freeze
from dsv3_megatron.checkpoint.manifest import WEIGHTS, read_content
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.model.freeze import is_frozen
from launcher.command_line.compose import load_resolved
from launcher.export_hf import main as export
from testing.ranks import run_ranks
from testing.training.checkpoints import assert_same_tensors, tensors
from testing.training.lives import Life, live
from testing.training.tiny import named_weights, small_recipe
from testing.training.whole_runs import refusal, train

WORDS = ("model.num_hidden_layers=4", "optim.micro_batch=1", "data.sequence_length=16", "optim.ema_decay=0.5")
FREEZE = ("embedding", "layers.0-1", "experts", "norms")
FROZEN = f"model.freeze=[{','.join(FREEZE)}]"
DUAL = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "parallel.expert=2")
LAYOUTS = {
    "dualpipe, EP2": (4, DUAL),
    "interleaved, DP2": (4, ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.chunks=2")),
    "TP2, expert-TP2": (2, ("parallel.tensor=2", "parallel.expert_tensor=2")),
    "DP2": (2, ()),
    "CP2, EP2": (2, ("parallel.context=2", "parallel.expert=2")),
}


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 9))
def test_runs_are_cut_evenly_and_leave_no_gap(sizes, ranks):
    runs = even_runs(sizes, ranks)
    assert [[end for _, end in of][-1] for of in runs] == sizes and all(of[0][0] == 0 for of in runs)
    assert all(a[1] == b[0] for of in runs for a, b in pairwise(of))
    shares = [sum(of[rank][1] - of[rank][0] for of in runs) for rank in range(ranks)]
    assert max(shares) - min(shares) <= 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return (a checkpoint of step 2 of a frozen run, what the same process does next), on one rank."""
    folder = tmp_path_factory.mktemp("frozen")
    asked = [
        Life((*WORDS, FROZEN), steps=0, save=folder / "start"),
        Life((*WORDS, FROZEN), save=folder),
        Life((*WORDS, FROZEN), first=2, load=folder / "step_00000002"),
    ]
    _, _, (goes_on,) = run_ranks(1, live, asked)
    return folder / "step_00000002", goes_on


def test_it_holds_all_weights_and_the_states_of_what_is_trained(saved):
    path, _ = saved
    content, found, names = read_content(path), tensors(path), our_shapes(small_recipe(*WORDS).model)
    assert content["freeze"] == list(FREEZE)
    frozen = {name for name in names if is_frozen(FREEZE, name)}
    start = tensors(path.parent / "start" / "step_00000000")
    for name in names:
        assert torch.equal(found[name], start[name]) is (name in frozen or not found[name].any()), name
        trained = name not in frozen and not name.endswith("expert_bias")
        for state in ("optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."):
            assert (state + name in found) is trained, (state, name)
        assert (f"ema.{name}" in found) is (trained or name.endswith("expert_bias")), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_goes_on_from_it_and_saves_what_it_held(saved, tmp_path, layout):
    path, goes_on = saved
    ranks, words = LAYOUTS[layout]
    life = Life((*WORDS, FROZEN, *words), first=2, load=path, save=tmp_path)
    (found,) = run_ranks(ranks, live, [life])
    for rank in found:
        assert rank["notes"] == [] and rank["losses"] == pytest.approx(goes_on["losses"], rel=1e-5)
        assert rank["norms"] == pytest.approx(goes_on["norms"], rel=1e-4)
    assert_same_tensors(tmp_path / path.name, path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layout_saves_what_one_process_reads(tmp_path, precision):
    words = (*WORDS, FROZEN, f"precision={precision}")
    (many,) = run_ranks(4, live, [Life((*words, *DUAL), save=tmp_path)])
    path = tmp_path / "step_00000002"
    (one,), (again,) = run_ranks(
        1, live, [Life(words, steps=0, load=path, save=tmp_path / "one", first=2), Life(words, steps=0)]
    )
    assert one["notes"] == [] and many
    assert_same_tensors(tmp_path / "one" / path.name, path)
    for name, weight in again["weights"].items():
        if is_frozen(FREEZE, name):
            assert (one["weights"][name] == weight).all(), name


def test_ranks_that_hold_the_same_share_the_work(tmp_path):
    run_ranks(2, live, [Life((*WORDS, "model.freeze=[embedding,experts,layers.0-3]"), save=tmp_path)])
    files = read_content(tmp_path / "step_00000002")["files"].values()
    sizes = [facts["bytes"] for facts in files if facts.get("holds") == WEIGHTS]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)


OTHER = ("embedding", "router", "layers.1")
OTHER_WAYS = [((), 1, ()), (OTHER, 1, ()), (OTHER, 4, DUAL)]


@pytest.mark.parametrize(("freeze", "ranks", "words"), OTHER_WAYS)
def test_a_run_that_trains_other_parts_goes_on_and_says_what_begins_anew(saved, tmp_path, freeze, ranks, words):
    path, _ = saved
    now = f"model.freeze=[{','.join(freeze)}]"
    (found,) = run_ranks(ranks, live, [Life((*WORDS, now, *words), first=2, load=path, save=tmp_path)])
    notes = found[0]["notes"]
    assert len(notes) == 1 + bool(freeze) and "\n" not in "".join(notes)
    assert f"that were frozen in {path} (model.freeze = {list(FREEZE)}) are trained from here on" in notes[0]
    assert "their moments begin with zeros" in notes[0]
    before, after = tensors(path), tensors(tmp_path / path.name)
    for name in our_shapes(small_recipe(*WORDS).model):
        assert torch.equal(before[name], after[name]), name
        if name.endswith("expert_bias") or is_frozen(freeze, name):
            assert f"optimizer.state.param.{name}" not in after
            continue
        thawed = is_frozen(FREEZE, name)
        for state in ("param", "exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{state}.{name}"
            old = before[key] if not thawed else before[name] if state == "param" else torch.zeros(before[name].shape)
            assert torch.equal(after[key], old), key
        assert torch.equal(after[f"ema.{name}"], before[name if thawed else f"ema.{name}"]), name


def test_a_run_may_freeze_parts_of_one_that_trained_all(tmp_path):
    asked = [Life(WORDS, save=tmp_path), Life((*WORDS, FROZEN), first=2, load=tmp_path / "step_00000002")]
    _, (found,) = run_ranks(1, live, asked)
    (note,) = found["notes"]
    assert note.endswith("their moments are not loaded, nor an average of them")
    assert f"are frozen from here on (model.freeze = {list(FREEZE)})" in note
    before = tensors(tmp_path / "step_00000002")
    for name, weight in found["weights"].items():
        if is_frozen(FREEZE, name):
            assert (weight == before[name.replace(".experts.", ".experts.experts.")].numpy()).all(), name


@pytest.mark.parametrize(
    ("betas", "updates", "told"), [("[0.9,0.95]", 10**6, ""), ("[0.9,0.999]", 10**6, "6.6"), ("[0.9,0.999]", 0, "")]
)
def test_late_first_steps_are_told_where_they_are_long(betas, updates, told):
    recipe = small_recipe(*WORDS, f"optim.betas={betas}")
    found = Found(Path("step"), {}, updates=updates, freeze=("experts",))
    (note,) = _changed_freeze(found, SimpleNamespace(recipe=recipe))
    assert (f", and their first steps are up to {told} times as long as Adam's" in note) is bool(told)
    assert ("as long" in note) is bool(told)


def test_weights_and_average_are_exported_and_read_whole(tmp_path):
    over = ("optim.ema_decay=0.5", "run.steps=2", "optim.learning_rate=0.01", f"run.directory={tmp_path}/run")
    dual = (*DUAL, "optim.micro_batch=1", "model.freeze=[head,experts,layers.0-1]")
    assert refusal(train(4, *over, *dual)) is None
    for weights in ("trained", "ema"):
        words = [f"run={tmp_path}/run", f"output={tmp_path}/{weights}", "dtype=fp32", "processes=1"]
        assert export([*words, f"weights={weights}"]) == 0
    trained, average = (load_file(next((tmp_path / w).glob("*.safetensors"))) for w in ("trained", "ema"))
    assert trained.keys() == average.keys()
    ((same,),) = run_ranks(1, same_as_exported, [(tmp_path, ("trained", "ema"))])
    assert same == {"trained", "ema"}
    frozen = ("lm_head", "model.layers.0.", "model.layers.1.", ".experts.")
    names = [name for name in trained if "e_score" not in name and "shared_head.head" not in name]
    for name in names:
        equal = torch.equal(trained[name], average[name])
        assert equal is any(part in name for part in frozen), name
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert "freeze" not in config


def same_as_exported(asked):
    """Return the kinds of weights of which the model that is read back has the exported ones."""
    folder, kinds = asked
    recipe, found = load_resolved(folder / "run" / "recipe.yaml"), set()
    for kind in kinds:
        exported = load_file(next((folder / kind).glob("*.safetensors")))
        trained_all = recipe.model_copy(update={"model": recipe.model.model_copy(update={"freeze": ()})})
        # Whatever the recipe freezes by now, the checkpoint says of what it holds an average.
        for one in (recipe, trained_all):
            with trained_model(one, folder / "run", weights=kind) as model:
                mine = named_weights(model.parts)
                assert torch.equal(mine["output_layer.weight"], exported["lm_head.weight"])
                for layer in range(recipe.model.num_hidden_layers):
                    o_proj = mine[f"decoder.layers.{layer}.self_attention.linear_proj.weight"]
                    assert torch.equal(o_proj, exported[f"model.layers.{layer}.self_attn.o_proj.weight"]), layer
                    if layer >= recipe.model.first_k_dense_replace:
                        down = mine[f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight"][0]
                        assert torch.equal(down, exported[f"model.layers.{layer}.mlp.experts.0.down_proj.weight"])
        found.add(kind)
    return found
