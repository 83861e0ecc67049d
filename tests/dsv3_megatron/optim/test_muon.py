"""Muon against torch's own, on single matrices and over trainings, and Newton-Schulz against singular values."""

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.checkpoint.hugging_face.names import published_tensors
from dsv3_megatron.optim.exchange import Exchange
from dsv3_megatron.optim.muon import MOMENTUM, MuonWithAdamW, Piece
from dsv3_megatron.optim.newton_schulz import orthogonalise
from dsv3_megatron.optim.settings import MuonSettings
from dsv3_megatron.optim.spread import Box, Held, Holding, make_plan
from dsv3_megatron.routing.router import SequenceBalancedRouter
from dsv3_megatron.train.build import build_parts
from dsv3_megatron.train.step import train_step
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks
from testing.training.tiny import VALUES, named_parameters, small_recipe, step_batches_of, whole_gradients

COEFFICIENTS = MuonSettings().coefficients
RATE, DECAY = 3e-3, 0.1


@pytest.mark.parametrize("shape", [(8, 8), (6, 17), (17, 6), (1, 5)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values / values.square().sum(-1, keepdim=True).sqrt() > 0.01  # what five steps lift all the way
    result = orthogonalise(matrix.clone(), 5, COEFFICIENTS)
    diagonal = left.mT @ result @ right.mT
    assert torch.allclose(diagonal, torch.diag_embed(diagonal.diagonal(dim1=-2, dim2=-1)), atol=1e-9)
    found = diagonal.diagonal(dim1=-2, dim2=-1)[kept]
    assert (found > 0.65).all() and (found < 1.25).all()


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalise(torch.zeros(2, 3, 5), 5, COEFFICIENTS).any()


@pytest.fixture
def alone(one_process):
    return dist.group.WORLD


def ours(weights, alone, settings, moments=torch.float32):
    """Return our optimizer over runs that hold these matrices, one after the other in memory as ZeRO-1 has them."""
    runs = [torch.nn.Parameter(w.flatten().clone()) for w in weights]
    optimizer = MuonWithAdamW(runs, lr=RATE, weight_decay=DECAY, exp_avg_dtype=moments)
    pieces = [
        Piece.of(Held(Box(f"m{i}", 0, *w.shape[:1], 0, w.shape[1]), (w.shape[1], 1), 0), run)
        for i, (w, run) in enumerate(zip(weights, runs))
    ]
    shapes = {piece.box.matrix: (piece.box.rows, piece.box.columns) for piece in pieces}
    plan = make_plan(shapes, [Holding(tuple(p.box for p in pieces))], limit=60)  # several rounds
    dtype = torch.bfloat16 if settings.arithmetic == "bf16" else torch.float32
    optimizer.let_muon(runs, pieces, Exchange(plan, alone, dtype, torch.device("cpu")), settings)
    return runs, optimizer


@pytest.mark.parametrize("nesterov", [True, False])
def test_single_matrices_are_updated_as_torchs_muon_does(alone, nesterov):
    """In BF16, as torch's: the same operations, so that what differs is at most how a stack's products are summed."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=generator) for shape in ((8, 8), (6, 17), (17, 6), (8, 8), (40, 3))]
    runs, optimizer = ours(weights, alone, MuonSettings(nesterov=nesterov, arithmetic="bf16"))
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    torchs = torch.optim.Muon(
        theirs, lr=RATE, weight_decay=DECAY, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for run, weight in zip(runs, theirs):
            weight.grad = torch.randn(weight.shape, generator=generator)
            run.grad = weight.grad.flatten().clone()
        optimizer.step()
        torchs.step()
    for run, weight, start in zip(runs, theirs, weights):
        moved = (weight - start).norm()
        assert moved > 1e-3 and (run.view_as(weight) - weight).norm() < 2e-3 * moved
        momentum = optimizer.state[run][MOMENTUM].view_as(weight)
        assert torch.equal(momentum, torchs.state[weight]["momentum_buffer"])


def test_momentum_in_bf16_costs_little(alone):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(12, 20, generator=generator)]
    (exact,), one = ours(weights, alone, MuonSettings())
    (short,), other = ours(weights, alone, MuonSettings(), moments=torch.bfloat16)
    for _ in range(5):
        exact.grad = torch.randn(240, generator=generator)
        short.grad = exact.grad.clone()
        one.step()
        other.step()
    assert other.state[short][MOMENTUM].dtype == torch.bfloat16
    moved = (exact - weights[0].flatten()).norm()
    assert 0 < (exact - short).norm() < 0.02 * moved


def train_beside_torchs(steps):
    """Train the small recipe twice on this rank: by our optimizer, and by torch's Muon and AdamW on views of the same
    model's weights, fed our gradients. Return how far every weight's change is from theirs, relative to it."""
    recipe = small_recipe("optim.name=muon", "optim.clip=0.05")  # so that clipping takes part
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        start = {name: p.detach().clone() for name, p in named_parameters(parts).items()}
        for number in range(steps):
            train_step(parts, step_batches_of(parts, number), VALUES)
        mine = {name: p.detach().clone() for name, p in named_parameters(parts).items()}
    finally:
        stop_processes()
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        parameters = named_parameters(parts)
        published = (t for t in published_tensors(recipe.model) if len(t.shape) == 2 and t.copy_of is None)
        matrices = {t.name: t for t in published if t.name not in ("model.embed_tokens.weight", "lm_head.weight")}
        rest = {name: p for name, p in parameters.items() if name not in {module(t) for t in matrices.values()}}
        views = {name: torch.nn.Parameter(box(parameters[module(t)].detach(), t)) for name, t in matrices.items()}
        others = {name: torch.nn.Parameter(p.detach()) for name, p in rest.items()}
        optim = recipe.optim
        muon = torch.optim.Muon(
            views.values(), lr=VALUES.learning_rate, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            [
                {"params": [p for p in others.values() if p.dim() > 1], "weight_decay": optim.weight_decay},
                {"params": [p for p in others.values() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=VALUES.learning_rate, betas=optim.betas, eps=optim.epsilon,
        )  # fmt: skip
        for number in range(steps):
            biases = {k: v.clone() for c in parts.chunks.values() for k, v in c.named_buffers()}
            result = train_step(parts, step_batches_of(parts, number), VALUES, lambda *_: False)
            gradients, scale = whole_gradients(parts), min(1.0, optim.clip / (result.grad_norm + 1e-6))
            for name, view in views.items():
                view.grad = box(gradients[module(matrices[name])], matrices[name]) * scale
            for name, parameter in others.items():
                parameter.grad = gradients[name] * scale
            muon.step()
            adamw.step()
            assert all(torch.equal(biases[k], v) for c in parts.chunks.values() for k, v in c.named_buffers())
            move_biases(parts, result)
        theirs = {name: p.detach() for name, p in parameters.items()}
        return {k: ((mine[k] - theirs[k]).norm() / (theirs[k] - start[k]).norm()).item() for k in mine}
    finally:
        stop_processes()


def module(tensor):
    """Return the name of the parameter that a published tensor is a part of."""
    return tensor.key.replace(".experts.experts.", ".experts.")


def box(whole, tensor):
    """Return a published tensor's box of ours, as a matrix."""
    for axis, (first, size) in enumerate(zip(tensor.start, tensor.extent)):
        whole = whole.narrow(axis, first, size)
    return whole.view(tensor.shape)


def move_biases(parts, result):
    """Move the routers' biases as the step does that updates weights."""
    routers = (m for c in parts.chunks.values() for m in c.modules() if isinstance(m, SequenceBalancedRouter))
    for router, loads in zip(routers, torch.from_numpy(result.loads)):
        router.expert_bias += VALUES.bias_speed * torch.sign(loads.mean() - loads).float()


def in_float32(steps):
    """Let torch's Muon compute in float32 as ours does on a CPU: it asks its gradients for BF16."""
    torch.Tensor.bfloat16 = lambda self: self.clone()
    return train_beside_torchs(steps)


def test_a_training_is_torchs_muon_and_adamw_on_the_published_matrices():
    ((found,),) = run_ranks(1, in_float32, [4])
    worst = max(found, key=found.get)
    assert len(found) > 60 and found[worst] < 1e-4, (worst, found[worst])
