"""What a save and a resume cost on real ranks, counted: nothing is read twice, written unevenly or copied in vain."""

from benchmarks.at_scale import measured


def test_a_rank_reads_and_writes_its_share_and_no_more():
    found = measured(4)
    bounds = found["bounds"]
    assert bounds["read_over_checkpoint"] <= 1.3, "all ranks together"
    assert bounds["read_over_state"] <= 1.3, "the rank that reads most, of its own state"
    assert bounds["written_over_even"] <= 1.2
    assert bounds["growth_over_share"] <= 1.2 and bounds["growth_beside_over_share"] <= 1.2
    save, load = found["lives"][0]["save"], found["lives"][1]["load"]
    assert max(save["opened/checkpoint"][1:]) <= 3, "a file for weights, optimizer and average each"
    assert "read/description" in load and not any(load["read/description"][1:]), "rank 0 reads for all"
    assert all("all_gather_object" not in name for name in (*save, *load)), "nothing goes from all to all"
