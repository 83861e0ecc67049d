"""The first weights: the paper's distribution, the same for every layout, different for every parameter."""

import torch

from dsv3_megatron.train.build import build_parts
from parallel.groups import start_processes, stop_processes
from parallel.layout import Layout
from parallel.world import World
from testing.training.tiny import named_weights, small_recipe


def weights(*overrides):
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        return named_weights(build_parts(small_recipe(*overrides), Layout(), torch.device("cpu")))
    finally:
        stop_processes()


def test_every_matrix_has_the_papers_deviation_and_every_gain_is_one():
    for name, weight in weights("model.initializer_range=0.006").items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            assert abs(weight.std().item() / 0.006 - 1) < 0.15, name
            assert abs(weight.mean().item()) < 0.001, name


def test_no_two_parameters_and_no_two_experts_start_alike():
    found = [w for name, w in weights().items() if w.dim() > 1]
    experts = [w for w in found if w.dim() == 3]
    assert experts and all(not torch.equal(w[0], w[1]) for w in experts)
    firsts = [w.flatten()[0].item() for w in found]
    assert len(set(firsts)) == len(firsts)


def test_the_seed_decides_the_weights():
    one, same, other = weights(), weights(), weights("run.seed=99")
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if one[n].dim() > 1)
