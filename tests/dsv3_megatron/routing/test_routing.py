"""Gate, bias update, balance loss and MaxVio against slow, plain references."""

import pytest
import torch

from dsv3_megatron.model.config import transformer_config
from dsv3_megatron.routing.bias import update_expert_bias
from dsv3_megatron.routing.router import SequenceBalancedRouter
from dsv3_megatron.train.expert_load import RunningLoads, max_violation
from parallel.layout import Layout
from parallel.settings import ParallelSettings
from testing.training.tiny import small_recipe


def router(groups, *overrides):
    """Return a router with random weights and biases, and its settings."""
    model = small_recipe(*overrides).model
    config = transformer_config(model, ParallelSettings(), Layout(), balance_weight=0.5)
    found = SequenceBalancedRouter(config, pg_collection=groups)
    found.layer_number = 1
    torch.nn.init.normal_(found.weight, std=0.3)
    if found.expert_bias is not None:
        found.expert_bias.normal_(0, 0.1)
    return found, model


def slow_choice(affinity, bias, model):
    """Return the experts one token goes to: two best of each group, best groups, best inside them (paper 2.1.2)."""
    scores = (affinity + bias).tolist()
    size = model.n_routed_experts // model.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(model.n_group)]
    merit = [sum(sorted((scores[e] for e in group), reverse=True)[:2]) for group in groups]
    allowed = sorted(range(model.n_group), key=lambda g: -merit[g])[: model.topk_group]
    candidates = [e for g in allowed for e in groups[g]]
    return sorted(sorted(candidates, key=lambda e: -scores[e])[: model.num_experts_per_tok])


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.num_experts_per_tok=4",), ("model.n_routed_experts=16", "model.num_experts_per_tok=3")],
)
def test_the_gate_chooses_and_weighs_as_the_paper_says(overrides, one_process):
    torch.manual_seed(1)
    gate, model = router(one_process, *overrides)
    hidden = torch.randn(16, 2, 64)
    weights, chosen = gate(hidden)
    affinity = torch.sigmoid(hidden.view(-1, 64) @ gate.weight.t())
    for token in range(32):
        expected = slow_choice(affinity[token], gate.expert_bias, model)
        assert chosen[token].nonzero().flatten().tolist() == expected
        share = affinity[token, expected] / affinity[token, expected].sum()
        torch.testing.assert_close(weights[token, expected], share * model.routed_scaling_factor)
    assert (weights[~chosen] == 0).all()


def test_softmax_routing_weighs_by_the_softmax_over_the_chosen(one_process):
    gate, model = router(
        one_process,
        "model.scoring_func=softmax",
        "model.n_group=1",
        "model.topk_group=1",
        "model.routed_scaling_factor=1.0",
        "model.topk_method=capacity",
    )
    hidden = torch.randn(8, 2, 64)
    weights, chosen = gate(hidden)
    logits = hidden.view(-1, 64) @ gate.weight.t()
    values, places = logits.topk(model.num_experts_per_tok)
    torch.testing.assert_close(weights.gather(1, places), values.softmax(-1))
    assert gate.expert_bias is None and chosen.sum() == 16 * model.num_experts_per_tok


def slow_balance(logits, chosen, topk):
    """Return sum f_i P_i of one sequence by loops (Eq. 17 to 20); logits and chosen are [S, E]."""
    length, experts = logits.shape
    affinity = torch.sigmoid(logits)
    normal = affinity / affinity.sum(-1, keepdim=True)
    total = 0.0
    for expert in range(experts):
        fraction = experts / (topk * length) * chosen[:, expert].sum()
        total = total + fraction * normal[:, expert].mean()
    return total


def test_the_balance_loss_counts_the_experts_that_tokens_are_sent_to(one_process):
    torch.manual_seed(2)
    gate, _model = router(one_process)
    gate.expert_bias[0] = 1.0  # expert 0 is chosen by its bias: a count of the best affinities would miss it
    hidden = torch.randn(16, 3, 64)
    _, chosen = gate(hidden)
    logits = (hidden @ gate.weight.t()).detach()
    expected = [slow_balance(logits[:, b], chosen.view(16, 3, -1)[:, b], 2) for b in range(3)]
    assert gate.balance_sum.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_balance_gradient_is_that_of_the_mean_over_sequences(sequences, one_process):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    torch.manual_seed(3)
    gate, _model = router(one_process)
    hidden = torch.randn(16, sequences, 64)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    weights, chosen = gate(hidden)
    (weights * 0).sum().backward()
    tokens = 16 * sequences
    got = gate.weight.grad / tokens  # as the trainer does at the end of a step

    weight = gate.weight.detach().clone().requires_grad_()
    logits, sent = hidden @ weight.t(), chosen.view(16, sequences, -1)
    losses = [slow_balance(logits[:, b], sent[:, b], 2) for b in range(sequences)]
    (0.5 * torch.stack(losses).mean()).backward()
    torch.testing.assert_close(got, weight.grad, rtol=1e-4, atol=1e-7)


def test_loads_are_counted_once_a_forward_and_not_in_evaluation(one_process):
    gate, model = router(one_process)
    hidden = torch.randn(16, 2, 64)
    gate(hidden)
    with torch.no_grad():
        gate(hidden)
    assert gate.local_tokens_per_expert.sum() == 32 * model.num_experts_per_tok


def test_the_bias_moves_against_the_load_and_stays_at_the_mean():
    bias = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    moved = update_expert_bias(bias, torch.tensor([[9, 5, 5, 1]]), speed=0.001)
    torch.testing.assert_close(moved, torch.tensor([[0.099, 0.2, 0.3, 0.401]]))


def test_speed_zero_freezes_the_bias():
    bias = torch.randn(2, 8)
    assert torch.equal(update_expert_bias(bias, torch.randint(0, 9, (2, 8)), speed=0.0), bias)


@pytest.mark.parametrize(("loads", "speed"), [(torch.zeros(3), 0.1), (torch.zeros(4), -0.1)])
def test_the_bias_update_refuses_what_cannot_be(loads, speed):
    with pytest.raises(ValueError, match="bias"):
        update_expert_bias(torch.zeros(4), loads, speed=speed)


def test_max_violation_is_the_busiest_expert_above_the_mean():
    loads = torch.tensor([[4, 4, 4, 4], [8, 4, 2, 2], [16, 0, 0, 0]])
    assert max_violation(loads).tolist() == [0.0, 1.0, 3.0]


def test_running_loads_average_what_chance_scatters():
    running, generator = RunningLoads(), torch.Generator().manual_seed(0)
    for _ in range(400):  # even in the long run, uneven in every batch
        loads = torch.multinomial(torch.ones(8), 64, replacement=True, generator=generator).bincount(minlength=8)
        average = running.update(loads.unsqueeze(0))
    assert max_violation(loads.unsqueeze(0)).item() > 0.3 > 0.1 > max_violation(average).item()
    assert average.sum().item() == pytest.approx(1.0)
