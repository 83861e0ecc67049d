"""Whether a label is the likeliest token, over a vocabulary that tensor-parallel ranks hold in parts."""

import pytest
import torch
import torch.distributed as dist

from dsv3_megatron.pipeline.scores import is_likeliest, sequence_scores
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks

VOCABULARY = 16


def logits_and_labels(tied):
    """Return logits [B, S, V] of few different values, so that the likeliest are often equal, and labels [B, S], one in
    three of them the first of the likeliest, one in three another of them where there is one."""
    generator = torch.Generator().manual_seed(tied)
    logits = torch.randint(0, tied, (3, 40, VOCABULARY), generator=generator).float()
    labels = torch.randint(0, VOCABULARY, (3, 40), generator=generator)
    first = logits.argmax(-1)
    last = VOCABULARY - 1 - logits.flip(-1).argmax(-1)
    labels[:, ::3], labels[:, 1::3] = first[:, ::3], last[:, 1::3]
    return logits, labels


def chosen_of(tied):
    """Return on this rank which labels are the likeliest, from its part of the vocabulary."""
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=60)
    try:
        logits, labels = logits_and_labels(tied)
        part = logits.chunk(world.size, dim=-1)[world.rank].contiguous()
        none = torch.full_like(part, -1.0)  # labels that are nowhere the likeliest
        none[..., -1] = 0.0
        away = torch.zeros_like(labels)
        return [
            [
                is_likeliest(*each, dist.group.WORLD, host_may_wait=waits).tolist()
                for each in ((part, labels), (none, away))
            ]
            for waits in (True, False)
        ]
    finally:
        stop_processes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_equally_likely_tokens_the_first_is_chosen(ranks):
    cases = [2, 5, 10_000]
    for tied, found in zip(cases, run_ranks(ranks, chosen_of, cases)):
        logits, labels = logits_and_labels(tied)
        for chosen, none in (both for each in found for both in each):
            assert torch.equal(torch.tensor(chosen), logits.argmax(-1) == labels)
            assert torch.tensor(chosen)[:, ::3].all() and not torch.tensor(none).any()


def test_scores_are_sums_over_the_tokens_that_count():
    losses, chosen = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, False]])
    assert sequence_scores(losses, chosen, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [[-3.0, 2.0, 1.0]]
    assert sequence_scores(losses, chosen, torch.tensor([[1.0, 0.0, 0.0]])).tolist() == [[-1.0, 1.0, 0.0]]
