"""The largest attention logits: those of all S x S pairs that attention looks at, whatever the blocks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.model.costs import LOGITS_AT_ONCE, logit_block
from dsv3_megatron.model.layers.attention import CoreAttention
from dsv3_megatron.model.layers.max_logits import MaxLogits, _see_inputs, causal_max
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.ranks import run_ranks

SCALE = 0.3


def of_all_pairs(query, key, documents=None):
    """Return the largest logit of every head [H] from all S x S scores of query and key [S, B, H, Q]."""
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), key.double()) * SCALE
    place = torch.arange(len(query))
    seen = (place[None, :] <= place[:, None]).expand(query.shape[1], -1, -1)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return scores.masked_fill(~seen[:, None], float("-inf")).amax((0, 2, 3)).float()


def drawn(length, batch, heads, seed, dtype=torch.float32):
    make = torch.Generator().manual_seed(seed)
    return (torch.randn(length, batch, heads, 5, generator=make).to(dtype) for _ in range(2))


@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    at_once=st.integers(1, 300),
    bf16=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_blocks_of_any_size_find_the_largest_of_all_pairs(length, batch, heads, at_once, bf16, seed):
    query, key = drawn(length, batch, heads, seed, torch.bfloat16 if bf16 else torch.float32)
    found = causal_max(query, key, at_once) * SCALE
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, of_all_pairs(query, key))


@given(length=st.integers(1, 1 << 18), heads=st.integers(1, 128), at_once=st.sampled_from([1 << 16, LOGITS_AT_ONCE]))
@settings(deadline=None)
def test_a_block_is_bounded_whatever_the_sequence(length, heads, at_once):
    rows, together = logit_block(length, heads, at_once)
    assert 1 <= rows <= length and 1 <= together <= heads
    assert rows * together * length <= max(at_once, length)


def attention(heads):
    """Return the torch backend's attention with somewhere to write its largest logits."""
    config = SimpleNamespace(attention_dropout=0.0, recompute_granularity=None, recompute_modules=[])
    core = CoreAttention(config, 1, None, "self", softmax_scale=SCALE)
    core.max_logits = MaxLogits(heads, SCALE, torch.device("cpu"))
    return core


@given(
    cuts=st.lists(st.lists(st.integers(1, 23), max_size=4), min_size=1, max_size=2),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_isolated_documents_have_the_logits_of_their_own_pairs(cuts, heads, seed):
    query, key = drawn(24, len(cuts), heads, seed)
    documents = torch.stack([(torch.arange(24)[:, None] >= torch.tensor(c, dtype=int)).sum(1) for c in cuts]).int()
    core = attention(heads)
    core(query, key, key, documents)
    torch.testing.assert_close(core.max_logits.take(), of_all_pairs(query, key, documents))


def test_microbatches_add_up_to_their_maximum_and_evaluations_do_not_count():
    core = attention(2)
    first, second = list(drawn(9, 1, 2, 0)), list(drawn(9, 1, 2, 1))
    for query, key in (first, second):
        core(query, key, key)
    core.eval()
    core(first[0] * 100, first[1], first[1])
    expected = torch.maximum(of_all_pairs(*first), of_all_pairs(*second))
    torch.testing.assert_close(core.max_logits.take(), expected)
    assert core.max_logits.take().eq(float("-inf")).all()  # begun again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_not_lost(bad):
    largest = MaxLogits(2, SCALE, torch.device("cpu"))
    query, key = (torch.ones(4, 1, 2, 3) for _ in range(2))
    query[2, 0, 1, 0] = bad
    largest.see(query, key)
    largest.see(torch.ones(4, 1, 2, 3), key)  # a later microbatch is in order
    found = largest.take()
    assert found[0] == pytest.approx(3 * SCALE) and not found[1].isfinite()


def test_nothing_is_kept_for_backward():
    query, key = drawn(9, 1, 2, 0)
    query.requires_grad_()
    largest = MaxLogits(2, SCALE, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: pytest.fail("kept"), lambda x: x):
        largest.see(query, key)
    assert not largest.take().requires_grad


def seen_in_pieces(heads):
    """Return what this context-parallel rank sees of attention's inputs as Transformer Engine is given them."""
    world = World.from_environment()
    start_processes(world, torch.device("cpu"), timeout_seconds=100)
    try:
        pieces = [x.chunk(2 * world.size) for x in drawn(16, 2, heads, 0)]
        inputs = tuple(torch.cat([p[world.rank], p[2 * world.size - 1 - world.rank]]) for p in pieces)
        largest = MaxLogits(heads, SCALE, torch.device("cpu"))
        _see_inputs(largest, dist.group.WORLD, torch.nn.Module(), inputs)
        _see_inputs(largest, dist.group.WORLD, torch.nn.Module().eval(), tuple(100 * x for x in inputs))
        return largest.take().tolist()
    finally:
        stop_processes()


def test_context_parallel_ranks_see_whole_sequences_of_their_heads():
    ((*ranks,),) = run_ranks(2, seen_in_pieces, [4])
    expected = of_all_pairs(*drawn(16, 2, 4, 0))
    for rank, found in enumerate(map(torch.tensor, ranks)):
        mine = slice(2 * rank, 2 * rank + 2)
        torch.testing.assert_close(found[mine], expected[mine])
        assert found.isfinite().sum() == 2  # other ranks see the others
