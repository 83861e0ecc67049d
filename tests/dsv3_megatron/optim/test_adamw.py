"""Our AdamW against torch's, and its states through a save."""

import copy

import megatron.core.optimizer as optimizers
import megatron.core.optimizer.distrib_optimizer as distributed
import pytest
import torch

from dsv3_megatron.optim import adamw, optimizer
from dsv3_megatron.optim.adamw import FusedAdam
from dsv3_megatron.optim.muon import MuonWithAdamW
from launcher.command_line.compose import compose

BF16 = torch.bfloat16


def stepped(optimizer, parameter, seed):
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype)
    optimizer.step()
    return parameter.detach().clone()


def test_it_steps_as_torchs_adamw_does():
    values = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine, theirs = torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.ones(50))
    ours, torchs = FusedAdam([mine], **values), torch.optim.AdamW([theirs], **values)
    for seed in range(5):
        torch.testing.assert_close(stepped(ours, mine, seed), stepped(torchs, theirs, seed), rtol=1e-6, atol=1e-7)


def test_both_ways_of_updating_are_one():
    group = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "lr": 0.01, "step": 7}
    generator = torch.Generator().manual_seed(1)
    weight, gradient, first = torch.randn(3, 100, generator=generator)
    kept = [[weight.clone()], [gradient], [first.clone()], [first.square()]]
    other = [[x.clone() for x in one] for one in kept]
    FusedAdam._update_in_one_pass(group, *kept)
    FusedAdam._update_in_turns(group, *other)
    for mine, theirs in zip(kept, other):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)
    assert not torch.equal(kept[0][0], weight)


@pytest.mark.parametrize("moments", [torch.float32, BF16])
def test_masters_and_moments_of_bf16_weights_keep_their_dtypes_through_a_save(moments):
    made = {"lr": 1e-4, "master_weights": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64).to(BF16))
    optimizer = FusedAdam([weight], **made)
    for seed in range(3):
        stepped(optimizer, weight, seed)
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = FusedAdam([again], **made)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = resumed.state[again]
    assert state["master_param"].dtype is torch.float32
    assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is moments
    assert not torch.equal(state["master_param"], again.float())  # what BF16 cannot hold is still there
    for seed in range(3, 6):
        assert torch.equal(stepped(optimizer, weight, seed), stepped(resumed, again, seed))
        assert torch.equal(optimizer.state[weight]["master_param"], resumed.state[again]["master_param"])


@pytest.mark.parametrize("moments", [torch.float32, BF16])
def test_portions_change_nothing(moments, monkeypatch):
    def weights_after_three_steps():
        made = [torch.nn.Parameter(torch.linspace(0.5, 1.5, size)) for size in (3, 40, 8, 1, 25)]
        optimizer = FusedAdam(made, lr=0.01, exp_avg_dtype=moments, exp_avg_sq_dtype=moments)
        for seed in range(3):
            for number, weight in enumerate(made):
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * seed + number))
            optimizer.step()
        return made

    whole = weights_after_three_steps()
    monkeypatch.setattr(adamw, "_TOGETHER", 12)
    sizes = [[p.numel() for p in portion] for portion in adamw._portions(whole)]
    assert sizes == [[3], [40], [8, 1], [25]]
    for mine, one in zip(weights_after_three_steps(), whole):
        assert torch.equal(mine, one)


@pytest.mark.parametrize(
    "found, precision, said",
    [
        (None, "bf16", "AdamW of this package over torch's (neither Transformer Engine nor Apex is installed)"),
        (None, "fp32", "AdamW of this package over torch's (neither Transformer Engine nor Apex is installed)"),
        ("Transformer Engine", "bf16", "Transformer Engine's fused AdamW"),
        ("Apex", "bf16", "AdamW of this package over torch's (Apex's cannot hold moments in BF16)"),
        ("Apex", "fp32", "Apex's fused AdamW"),
    ],
)
def test_a_gpu_uses_a_fused_adamw_where_one_is_and_ours_elsewhere(found, precision, said, monkeypatch):
    theirs = type("FusedAdam", (torch.optim.Optimizer,), {})
    monkeypatch.setattr(optimizer, "_THEIRS", found)
    values = {"Adam": theirs, "HAVE_APEX_OR_TE": bool(found), "USING_TE_OPTIMIZER": found == "Transformer Engine",
              "USING_APEX_OPTIMIZER": found == "Apex"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(distributed, name, value)
    for name, value in (("Adam", theirs), ("USING_PYTORCH_OPTIMIZER", not found), ("is_te_min_version", None)):
        monkeypatch.setattr(optimizers, name, value)
    recipe = compose(["recipe=dsv3_tiny", f"precision={precision}"])
    for backend in ("te", "torch"):
        assert optimizer.choose_optimizer(recipe.optim, backend, torch.device("cuda", 3), recipe.precision) == said
        assert optimizers.Adam is distributed.Adam is (FusedAdam if said.startswith("AdamW of this") else theirs)
        assert not optimizers.USING_PYTORCH_OPTIMIZER and distributed.HAVE_APEX_OR_TE
    muon = recipe.optim.model_copy(update={"name": "muon"})
    said_of_muon = optimizer.choose_optimizer(muon, "te", torch.device("cuda", 3), recipe.precision)
    assert said_of_muon == "Muon and AdamW of this package over torch's"
    assert optimizers.Adam is distributed.Adam is MuonWithAdamW and not optimizers.USING_PYTORCH_OPTIMIZER
    again = optimizer.choose_optimizer(recipe.optim, "te", torch.device("cuda", 3), recipe.precision)  # a second run
    assert again.startswith("AdamW of this package") and optimizers.Adam is FusedAdam
