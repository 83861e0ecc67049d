"""No node and no rack holds both copies of a share, whatever ranks and hosts there are."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.checkpoint.memory.placement import peers_of, rack_of_host

# Ranks of every node, by rack: r0n0, r0n1, ..., r1n0, ... Not all alike, as where a node has lost a GPU.
CLUSTERS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6)


def hosts_of(cluster, order=None):
    """Return the node of every rank; racks as patterns."""
    nodes = [(f"r{r}n{n}", ranks) for r, rack in enumerate(cluster) for n, ranks in enumerate(rack)]
    return [host for host, ranks in (order or (lambda x: x))(nodes) for _ in range(ranks)], [
        f"r{r}n*" for r in range(len(cluster))
    ]


@given(CLUSTERS, st.randoms(use_true_random=False), st.booleans())
def test_no_node_or_rack_holds_both_copies_of_a_share(cluster, random, racks_are_known):
    """Nodes come in any order: SLURM's need not be that of the racks."""
    hosts, racks = hosts_of(cluster, lambda nodes: random.sample(nodes, len(nodes)))
    racks = racks if racks_are_known else []
    found = peers_of(hosts, racks)
    in_racks = [rack_of_host(host, racks) for host in hosts]

    def possible(places):
        return 2 * max(Counter(places).values()) <= len(hosts)

    if not possible(hosts):
        assert found.keeper_of is None
        return
    assert sorted(found.keeper_of) == list(range(len(hosts)))  # each keeps one copy: memory is even
    assert all(hosts[rank] != hosts[keeper] for rank, keeper in enumerate(found.keeper_of))
    if racks and possible(in_racks):
        assert found.apart == "racks"
        assert all(in_racks[rank] != in_racks[keeper] for rank, keeper in enumerate(found.keeper_of))
    else:
        assert found.apart == "nodes"


@given(st.integers(2, 8), st.integers(1, 8))
def test_ranks_of_the_same_number_on_their_nodes_are_paired(nodes, ranks):
    keepers = peers_of(hosts_of([[ranks] * nodes])[0]).keeper_of
    assert all(rank % ranks == keeper % ranks for rank, keeper in enumerate(keepers))


def test_one_node_has_no_peer_and_a_rack_of_more_than_half_leaves_nodes_apart():
    assert peers_of(["a"] * 8).keeper_of is None
    assert peers_of(["a", "b", "c"], ["a,b", "c"]).apart == "nodes"
    assert peers_of(["a", "b", "c", "d"], ["a,b", "c,d"]) == peers_of(["a", "b", "c", "d"], ["a, b"])
    assert peers_of(["a", "b", "c", "d"], ["a,b"]).keeper_of == (2, 3, 0, 1)
