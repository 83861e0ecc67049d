"""The plan of what states in memory cost a node: every share that is there at the fullest moment is counted once."""

from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.memory.placement import peers_of
from dsv3_megatron.planning.host_memory import states_in_memory


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 1 << 40))
def test_a_node_holds_its_ranks_shares_and_the_copies_that_they_keep_twice(nodes, ranks, share):
    """Counted from who keeps whose copy: two states, and one more share a rank that the next is copied to first."""
    hosts = [f"n{node}" for node in range(nodes) for _ in range(ranks)]
    keepers = peers_of(hosts).keeper_of
    own = hosts.count("n0")
    copies = 0 if keepers is None else sum(hosts[keeper] == "n0" for keeper in keepers)
    plan = states_in_memory(share, ranks, nodes)
    assert plan.file_bytes == 2 * (own + copies) * share
    assert plan.peak_bytes == plan.file_bytes + own * share
    assert plan.lasting_bytes == (own + copies + own) * share
    assert plan.sent_bytes == (share if keepers else 0)


def test_a_node_of_eight_ranks_of_the_largest_recipe():
    """4.71 GB a share (docs/scale.md): 151 GB of files, 188 GB in all."""
    plan = states_in_memory(4_710_000_000, 8, 256)
    assert (round(plan.file_bytes / 1e9), round(plan.peak_bytes / 1e9), round(plan.lasting_bytes / 1e9)) == (
        151,
        188,
        113,
    )
