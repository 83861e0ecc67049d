"""The average of the weights on the host: its recurrence, in every kind of layout, beside training."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsv3_megatron.checkpoint.shares import Share, shares_of
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.model.initialise import global_name
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.ema import Ema
from dsv3_megatron.train.step import train_step
from launcher.command_line.compose import load_resolved
from launcher.export_hf import main as export
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import TE, run_ranks
from testing.training.on_te import WORDS
from testing.training.tiny import VALUES, named_weights, small_recipe, step_batches_of
from testing.training.whole_runs import refusal, train

DECAY = 0.7


def average_in_training(overrides):
    """Train three steps; return, of this rank, the largest difference of the average from its recurrence and from the
    weights, and of the weights from it once it is copied into them, as a share of the largest."""
    recipe, world = small_recipe(f"optim.ema_decay={DECAY}", *overrides), World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=120)
    try:
        parts = build_parts(recipe, recipe.layout(world.size), torch.device("cpu"))
        expected = {k: v.float().double() for k, v in named_weights(parts).items()}
        for number in range(3):
            train_step(parts, step_batches_of(parts, number), VALUES, lambda loss, norm: parts.ema.wait() or True)
            parts.ema.start()
            for name, weight in named_weights(parts).items():
                expected[name] = DECAY * expected[name] + (1 - DECAY) * weight.float().double()
        parts.ema.wait()
        shares = [s for s in shares_of(parts.chunks, parts.optimizer, parts.groups) if s.end > s.start]
        found = [parts.ema.average[share.name] for share in shares]
        weights = named_weights(parts)
        moved = max(largest(a - run(share, parts, weights)) for share, a in zip(shares, found))
        error = max(largest(a - run(share, parts, expected)) for share, a in zip(shares, found))
        parts.ema.copy_into_weights()
        weights = named_weights(parts)
        copied = (largest(a - run(share, parts, weights)) / largest(a) for share, a in zip(shares, found))
        holders = parts.groups.dp_cp.size(), parts.groups.expt_dp.size()
        held = sum(p.numel() for chunk in parts.chunks.values() for p in chunk.parameters())
        averaged = sum(average.numel() for average in found)
        assert holders[0] != holders[1] or averaged == pytest.approx(held / holders[0], rel=0.02)
        return error, moved, max(copied)
    finally:
        stop_processes()


def run(share, parts, tensors):
    """Return a rank's run of a tensor in float32, of those by their names in the whole model."""
    stage, _, name = share.name.partition(".")
    whole = tensors[global_name(name, parts.first_layer(int(stage.removeprefix("stage"))))]
    return whole.float().contiguous().view(-1)[share.start : share.end]


def largest(tensor):
    return tensor.abs().max().item()


def test_the_average_is_its_recurrence_in_every_layout():
    dual = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1")
    for ranks, cases in ((1, [()]), (2, [("parallel.expert=2",), dual, (*dual, "precision=bf16")])):
        for case, results in zip(cases, run_ranks(ranks, average_in_training, cases)):
            for error, moved, copied in results:
                assert error < 1e-6 < 1e-4 < moved, case
                assert copied < (2**-8 if "precision=bf16" in case else 1e-7), case


@pytest.mark.full
def test_the_average_of_weights_held_in_fp8_is_that_of_the_numbers_they_stand_for():
    dual = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1")
    case = (*WORDS, "precision=fp8_held", *dual)
    for error, moved, copied in run_ranks(2, average_in_training, [case], preload=TE)[0]:
        assert error < 1e-6 < 1e-4 < moved
        assert copied < 2**-4, "quantised again, with scales of its own"


def whole(layer):
    """Return the weight of a layer, all of it, as a share."""
    return Share("weight", layer.weight, 0, layer.weight.numel(), ())


def test_averaging_runs_beside_training_and_is_waited_for():
    layer = torch.nn.Linear(4, 4, bias=False)
    before = layer.weight.detach().clone()
    ema, gate = Ema([whole(layer)], 0.5), threading.Event()
    update = ema._update
    ema._update = lambda: (gate.wait(10), update())
    with torch.no_grad():
        layer.weight.add_(1.0)
    ema.start()  # returns while the thread has not begun
    assert torch.equal(ema.average["weight"].view(4, 4), before)
    gate.set()
    ema.wait()
    torch.testing.assert_close(ema.average["weight"].view(4, 4), before + 0.5)
    ema.copy_into_weights()
    torch.testing.assert_close(layer.weight.detach(), before + 0.5)


def test_what_fails_beside_training_is_raised_where_it_is_waited_for():
    ema = Ema([whole(torch.nn.Linear(2, 2))], 0.5)
    ema.average["weight"] = torch.zeros(3)
    ema.start()
    with pytest.raises(RuntimeError, match="size of tensor"):
        ema.wait()
    ema.wait()


def test_the_average_is_saved_in_one_layout_and_goes_on_in_another(tmp_path):
    over = ("optim.ema_decay=0.5", "run.steps=4", "checkpoint.every_steps=2", "optim.learning_rate=0.01")
    assert refusal(train(1, *over, f"run.directory={tmp_path}/whole")) is None
    dual = ("parallel.pipeline=2", "parallel.schedule=dualpipe", "optim.micro_batch=1", "parallel.expert=2")
    assert refusal(train(4, *over, *dual, "run.steps=2", f"run.directory={tmp_path}/torn")) is None
    assert refusal(train(2, *over, "parallel.tensor=2", f"run.directory={tmp_path}/torn")) is None
    (((whole, torn),),) = run_ranks(1, weights_of, [[tmp_path / "whole", tmp_path / "torn"]])
    for kind in ("trained", "ema"):
        assert difference(torn[kind], whole[kind]) < 2e-4, kind
    assert difference(whole["ema"], whole["trained"]) > 0.01


def test_the_average_is_exported_to_hugging_face(tmp_path, capsys):
    over = ("optim.ema_decay=0.5", "run.steps=2", "optim.learning_rate=0.01", f"run.directory={tmp_path}/run")
    assert refusal(train(1, *over)) is None
    for weights in ("trained", "ema"):
        arguments = [f"run={tmp_path}/run", f"output={tmp_path}/{weights}", "dtype=fp32", "processes=1"]
        assert export([*arguments, f"weights={weights}"]) == 0
    trained, average = (load_file(next((tmp_path / w).glob("*.safetensors"))) for w in ("trained", "ema"))
    assert trained.keys() == average.keys()
    ((expected,),) = run_ranks(1, head_of, [tmp_path / "run"])
    assert average["lm_head.weight"].tolist() == expected
    assert not torch.equal(trained["lm_head.weight"], average["lm_head.weight"])


def head_of(directory):
    """Return the output head of a run's average."""
    with trained_model(load_resolved(directory / "recipe.yaml"), directory, weights="ema") as model:
        return model.parts.whole_model.output_layer.weight.tolist()


def weights_of(directories):
    """Return the weights and their average, by kind and name, of each run."""
    found = []
    for directory in directories:
        recipe, kinds = load_resolved(directory / "recipe.yaml"), {}
        for kind in ("trained", "ema"):
            with trained_model(recipe, directory, weights=kind) as model:
                kinds[kind] = {name: weight.numpy() for name, weight in named_weights(model.parts).items()}
        found.append(kinds)
    return found


def difference(found, expected):
    """Return the largest difference of a weight from the expected, by their norms."""
    pairs = [(weight, expected[name]) for name, weight in found.items()]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
