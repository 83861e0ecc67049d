"""Our AdamW against torch's, and its states through a save."""

import copy

import pytest
import torch

from dsv3_megatron.optim.adamw import FusedAdam

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
