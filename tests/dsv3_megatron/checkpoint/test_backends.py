"""Checkpoints have one format: what one backend saved the other loads, in any layout, exports and imports."""

import io
import json
from contextlib import redirect_stdout
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from dsv3_megatron.checkpoint.hugging_face.export import export, shards_of
from dsv3_megatron.checkpoint.hugging_face.import_ import import_weights
from dsv3_megatron.checkpoint.hugging_face.names import our_shapes
from dsv3_megatron.checkpoint.hugging_face.sources import find_sources
from launcher import evaluate
from launcher.command_line.compose import load_resolved, resolved_yaml
from testing.lanes import names_in_lanes
from testing.ranks import TE, run_ranks
from testing.training.checkpoints import assert_same_tensors
from testing.training.lives import Life, live
from testing.training.on_te import FP8, WORDS
from testing.training.tiny import small_recipe

ON_TE = (*WORDS, "optim.ema_decay=0.9")
ON_TORCH = (*ON_TE, "backend=torch")
HELD = (*FP8, "precision.fp8.hold_weights=true")
TENSOR = tuple(f"precision.fp8.{role}_tile=tensor" for role in ("activation", "weight", "gradient"))
DELAYED = (*FP8, *TENSOR, "precision.fp8.scaling=delayed", "precision.fp8.swiglu_cache=high")
LAYOUTS = {
    "ep2": ("parallel.expert=2",),
    "tp2 ep2": ("parallel.tensor=2", "parallel.expert=2"),
    "dualpipe": ("parallel.pipeline=2", "parallel.schedule=dualpipe"),
}
STEP = "checkpoints/step_00000002"


PAIRS = ("torch > te", "te > torch")
FAST = (
    *("torch", "torch > torch", "te", "torch > te", "te > torch", "held", "held > weights", "deeper", "wider"),
    *(f"{pair} dualpipe" for pair in PAIRS),
)


@pytest.fixture(scope="module")
def lives(tmp_path_factory, in_full_lane):
    """Parts of runs by name, and (``place``) the folder of those that were saved, by their first part's name."""
    place = tmp_path_factory.mktemp("backends")
    found = {"place": place}

    def on(backend, ranks, cases):
        cases = {name: case for name, case in cases.items() if in_full_lane or name in FAST}
        preload = {"preload": TE} if backend == "te" else {}
        for name, result in zip(cases, run_ranks(ranks, live, list(cases.values()), **preload)):
            found[name] = result[0]

    def saved(words, name):
        return Life(words, save=place / name / "checkpoints")

    def again(words, of, into=None, steps=2, **more):
        save = place / into / "checkpoints" if into else None
        return Life(words, first=2, steps=steps, load=place / of / STEP, save=save, **more)

    on("torch", 1, {"torch": saved(ON_TORCH, "torch"), "torch > torch": again(ON_TORCH, "torch")})
    on("te", 1, {
        "te": saved(ON_TE, "te"),
        "torch > te": again(ON_TE, "torch"),
        "held": saved(HELD, "held"),
        "held > weights": again(HELD, "held", weights_alone=True, steps=0),
        "held > fp8": again(FP8, "held"),
        "held > bf16": again((*WORDS, "precision=bf16"), "held", steps=1),
        "fp8": saved(FP8, "fp8"),
        "fp8 > held": again(HELD, "fp8"),
        "fp8 > bf16": again((*WORDS, "precision=bf16"), "fp8", steps=1),
        "delayed": saved(DELAYED, "delayed"),
        "fp8 > delayed": again(DELAYED, "fp8", steps=1),
    })  # fmt: skip
    on("torch", 1, {
        "te > torch": again(ON_TORCH, "te", into="te on torch"),
        "held > torch": again((*FP8, "backend=torch"), "held", steps=1),
        "delayed > torch": again((*DELAYED, "backend=torch"), "delayed", steps=1),
        "deeper": again((*ON_TORCH, "model.num_hidden_layers=9"), "torch"),
        "wider": again((*ON_TORCH, "model.moe_intermediate_size=48"), "torch"),
    })  # fmt: skip
    on("te", 2, {f"torch > te {name}": again((*ON_TE, *words), "torch", into=name)
                 for name, words in LAYOUTS.items()})  # fmt: skip
    on("torch", 2, {f"te > torch {name}": again((*ON_TORCH, *words), "te") for name, words in LAYOUTS.items()})
    return found


def stored(lives, name):
    """Return what a checkpoint says of its tensors: key -> (shape, format)."""
    content = FileSystemReader(lives["place"] / name / STEP).read_metadata().state_dict_metadata
    return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in content.items()}


def expected_tensors(precision="fp32"):
    """Return what a checkpoint holds, from the table that exports and imports are made by."""
    low = torch.float32 if precision == "fp32" else torch.bfloat16
    found = {}
    for key, shape in our_shapes(small_recipe(*WORDS).model).items():
        is_bias = key.endswith("expert_bias")
        found[key] = shape, torch.float32 if is_bias else low
        for state in () if is_bias else ("param", "exp_avg", "exp_avg_sq"):
            found[f"optimizer.state.{state}.{key}"] = shape, torch.float32 if state == "param" else low
    return found


@pytest.mark.parametrize("name", names_in_lanes(["torch", "te", "fp8", "held"], *FAST))
def test_a_checkpoint_holds_the_tensors_of_the_table_and_no_others(lives, name):
    expected = expected_tensors("fp32" if name in ("torch", "te") else "bf16")
    if name in ("torch", "te"):
        expected |= {f"ema.{key}": expected[key] for key in our_shapes(small_recipe(*WORDS).model)}
    assert stored(lives, name) == expected


@pytest.mark.parametrize(
    ("again", "name"),
    [
        ("te on torch", "te"),
        ("dualpipe", "torch"),
        *(pytest.param(layout, "torch", marks=pytest.mark.full) for layout in LAYOUTS if layout != "dualpipe"),
    ],
)
def test_the_other_backend_saves_what_it_loaded_bit_for_bit_in_any_layout(lives, again, name):
    assert stored(lives, again) == stored(lives, name)
    assert_same_tensors(lives["place"] / again / STEP, lives["place"] / name / STEP)


@pytest.mark.parametrize(
    "name", names_in_lanes([*PAIRS, *(f"{pair} {layout}" for pair in PAIRS for layout in LAYOUTS)], *FAST)
)
def test_a_run_goes_on_alike_on_the_other_backend(lives, name):
    assert lives[name]["losses"] == pytest.approx(lives["torch > torch"]["losses"], rel=1e-6)
    assert lives[name]["norms"] == pytest.approx(lives["torch > torch"]["norms"], rel=1e-5)
    assert lives[name]["notes"] == []


def test_weights_held_in_fp8_are_stored_as_the_numbers_that_they_stand_for(lives):
    trained, loaded = lives["held"]["weights"], lives["held > weights"]["weights"]
    assert trained.keys() == loaded.keys()
    assert [name for name in trained if not np.array_equal(trained[name], loaded[name])] == []


@pytest.mark.full
def test_holding_weights_in_fp8_may_begin_and_end_with_a_checkpoint(lives):
    # The oracle: runs that are held throughout, or not at all, are the same.
    assert lives["held > fp8"]["losses"] == lives["fp8 > held"]["losses"]
    assert lives["held > bf16"]["losses"] == lives["fp8 > bf16"]["losses"]  # from the masters, not from FP8
    assert lives["held > torch"]["losses"] == pytest.approx(lives["held > fp8"]["losses"][:1], rel=3e-3)


@pytest.mark.full
def test_the_state_of_delayed_scaling_is_te_s_alone(lives):
    (told,) = lives["delayed > torch"]["notes"]
    assert "also holds te_amaxes" in told and "not loaded" in told
    (told,) = lives["fp8 > delayed"]["notes"]
    assert "holds no te_amaxes: it begins anew" in told
    names = {key for key in stored(lives, "delayed") if key.startswith("te_amaxes.")}
    assert stored(lives, "delayed").keys() - names == expected_tensors("bf16").keys()


def test_a_checkpoint_of_another_model_is_refused_by_a_tensor(lives):
    assert "holds no decoder.layers." in lives["deeper"]["refused"]
    assert "mlp.experts.experts.linear_fc" in lives["wider"]["refused"] and "has shape" in lives["wider"]["refused"]


@pytest.fixture(scope="module")
def exports(lives):
    """Folders of exported weights by the checkpoint's name."""
    model, found = small_recipe(*WORDS).model, {}
    for name in ("te", "te on torch", "held"):
        found[name] = lives["place"] / f"export of {name}"
        found[name].mkdir()
        source = lives["place"] / name / STEP
        shards = shards_of(model, source, found[name], dtype="fp32", shard_bytes=2**40)
        export(shards, found[name], processes=1)
    return found


def test_an_export_is_the_same_from_both_backends(lives, exports):
    mine, theirs = (load_file(next(exports[name].glob("*.safetensors"))) for name in ("te", "te on torch"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    held = load_file(next(exports["held"].glob("*.safetensors")))
    name = "model.layers.1.self_attn.o_proj.weight"
    trained = lives["held"]["weights"]["decoder.layers.1.self_attention.linear_proj.weight"]
    assert np.array_equal(held[name].numpy(), trained)


@pytest.mark.full
def test_imported_weights_train_on_te(lives, exports):
    recipe = small_recipe(*WORDS)
    options = {"recipe": resolved_yaml(recipe), "dtype": None, "processes": 1}
    sources = find_sources(recipe.model, exports["te"], {})
    path = import_weights(sources, lives["place"] / "imported/checkpoints", **options)
    words = {"fp32": WORDS, "fp8": FP8, "held": HELD}
    on_te = run_ranks(1, live, [Life(w, load=path) for w in words.values()], preload=TE)
    ((on_torch,),) = run_ranks(1, live, [Life((*WORDS, "backend=torch"), load=path)])
    losses = {name: found["losses"] for name, (found,) in zip(words, on_te)}
    assert losses["fp32"] == pytest.approx(on_torch["losses"], rel=1e-6)
    assert losses["held"] == losses["fp8"]  # masters begin with what was imported, not with what FP8 left of it


def held_out_loss(run):
    """Return the loss that launcher/evaluate.py prints of a run."""
    with redirect_stdout(io.StringIO()) as printed:
        assert evaluate.main([f"run={run}"]) == 0
    return json.loads(printed.getvalue())["held_out_loss"]


@pytest.mark.full
def test_a_run_on_te_is_evaluated_where_there_is_none(lives, capsys):
    run = lives["place"] / "te"
    (run / "recipe.yaml").write_text((run / STEP / "recipe.yaml").read_text())
    assert find_spec("transformer_engine") is None and load_resolved(run / "recipe.yaml").backend == "te"
    assert evaluate.main([f"run={run}"]) == 0
    told = capsys.readouterr()
    ((on_te,),) = run_ranks(1, held_out_loss, [run], preload=TE)
    assert json.loads(told.out)["held_out_loss"] == pytest.approx(on_te, rel=1e-6)
    assert "on backend torch, not te" in told.err and "transformer-engine, not installed" in told.err
