"""What a rank costs before its first step does not grow with the shards that it does not read."""

import pytest

from benchmarks.data_at_scale import STEP_SAMPLES, measure

FEW, MANY, RANKS = 60, 900, 2048
BESIDE = 30  # files of the folder itself, tokenizer, indexes of packings, and what the libraries look at


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return {count: measure(folder / str(count), count, RANKS) for count in (FEW, MANY)}


@pytest.mark.full
@pytest.mark.parametrize("who", ["rank", "first_rank"])
def test_a_rank_of_many_costs_the_same_with_fifteen_times_the_shards(starts, who):
    few, many = starts[FEW][who], starts[MANY][who]
    assert many["of_the_share"] <= few["of_the_share"] + 4
    assert many["stat_calls"] <= STEP_SAMPLES + BESIDE, "a shard for each sample"
    assert many["opens_of_the_share"] <= few["opens_of_the_share"] + 4
    assert many["opens"] <= 3 * STEP_SAMPLES + BESIDE, "a shard, its checksums and its packing for each sample"
    assert many["descriptors"] <= 64 + BESIDE
    assert many["mappings"] <= few["mappings"] + 60, "libraries differ by some; shards would be hundreds"
    assert many["memory_mib"] <= few["memory_mib"] + 8


@pytest.mark.full
def test_what_is_counted_is_there_to_count(starts):
    """A run on one rank looks at every file. Where that were not seen, the test above would see nothing either."""
    for count, found in starts.items():
        assert 3 * count <= found["alone"]["of_the_share"] <= 3 * count + BESIDE
        assert count - 1 <= found["alone"]["opens_of_the_share"] <= count + BESIDE
