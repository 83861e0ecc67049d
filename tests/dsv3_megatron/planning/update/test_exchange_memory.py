"""What an exchange holds at most, counted while its own code runs every rank's part of a plan, and as planned."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.optim.exchange import Exchange
from dsv3_megatron.optim.newton_schulz import orthogonalise
from dsv3_megatron.optim.spread import make_plan
from dsv3_megatron.pipeline.split import layers_of_stages
from dsv3_megatron.planning.update.exchange_memory import most_bytes, rounds_of
from dsv3_megatron.planning.update.holdings import group_of
from parallel.pipeline.live_memory import LiveMemory
from testing.training.tiny import small_recipe

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORMS = 256  # bytes: of matrices


class Unsent(Exchange):
    """An exchange of which nothing is sent: what would come has its size and no numbers."""

    def _all_to_all(self, sent, out, back):
        """Return what would come, and nothing to wait for."""
        if len(self._ranks) == 1:
            return super()._all_to_all(sent, out, back)
        received = self._empty(back)
        return received, lambda keep=sent: None


@pytest.mark.parametrize("limit", [1 << 26, 20000, 6000])  # of one round, several, and one for almost every matrix
@pytest.mark.parametrize(("world", "words"), [(1, ()), (4, ()), (4, ("parallel.tensor=2", "optim.muon.steps=1"))])
def test_an_exchange_holds_what_is_planned(world, words, limit):
    recipe = small_recipe("optim.name=muon", "model.num_hidden_layers=4", "optim.micro_batch=1", *words)
    layout, steps = recipe.layout(world), recipe.optim.muon.steps
    group = group_of(recipe, layout, layers_of_stages(recipe), 0, experts=False)
    plan = make_plan(group.plan.shapes, group.plan.holdings, limit)
    for rank, rounds in enumerate(rounds_of(plan)):
        members = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: world)
        exchange, memory = Unsent(plan, members, torch.bfloat16, torch.device("cpu")), LiveMemory()
        with memory:
            exchange.run(
                lambda places, views: None,
                lambda stack: orthogonalise(stack, steps, COEFFICIENTS),
                lambda places, updates: None,
            )
        planned = most_bytes(rounds, steps=steps, size=2, mixing=0, alone=world == 1)
        assert planned == pytest.approx(memory.peak_bytes, abs=NORMS)
        assert planned <= most_bytes(rounds, steps=steps, size=2, mixing=8, alone=world == 1)
