"""Newton-Schulz on stacks: many matrices come out as each does alone."""

import pytest
import torch

from dsv3_megatron.optim import newton_schulz
from dsv3_megatron.optim.newton_schulz import orthogonalise
from dsv3_megatron.optim.settings import MuonSettings

MUON = MuonSettings()


@pytest.mark.parametrize("shape", [(7, 24, 40), (7, 40, 24), (1, 40, 24), (0, 24, 40)])
@pytest.mark.parametrize("together", [1, 3, 7, 100])
def test_a_stack_that_is_cut_for_the_cache_gives_what_its_matrices_give_alone(shape, together, monkeypatch):
    monkeypatch.setattr(newton_schulz, "CACHED", together * 24 * 40 + 1)
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    alone = [orthogonalise(matrix[None].clone(), MUON.steps, MUON.coefficients) for matrix in stack]
    found = orthogonalise(stack.clone(), MUON.steps, MUON.coefficients)
    assert found.shape == shape
    torch.testing.assert_close(found, torch.cat(alone) if alone else stack, rtol=1e-4, atol=1e-5)
    if alone:
        assert torch.linalg.svdvals(found).min() > 0.4
