"""The arithmetic of docs/scale.md: growth is recognised and continued, tables are those of the figures measured."""

import json
import math

import pytest

from benchmarks.scale_groups import groups_of, mesh_messages
from benchmarks.scale_growth import growth
from benchmarks.scale_lives import place_of, words_of
from benchmarks.scale_page import bytes_of_a_parameter, target, with_tables
from benchmarks.scale_table import Target, bounds_table, growth_table, rows_of
from testing.pages import ROOT

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "at_scale.json").read_text())
RANKS = (2, 4, 8, 16, 32)
FORMS = {
    "constant": lambda n: 7,
    "log n": lambda n: 3 + 4 * math.log2(n),
    "n": lambda n: 10 + 3 * n,
    "n log n": lambda n: 5 * n * math.log2(n),
    "n^2": lambda n: 2 * n * n,
    "n^3.0": lambda n: n**3,
    "n^0.5": lambda n: 100 * n**0.5,
}


@pytest.mark.parametrize("form", FORMS)
def test_growth_is_recognised_and_continued(form):
    found = growth(RANKS, [FORMS[form](n) for n in RANKS])
    assert found.form == form
    assert found.at(2048) == pytest.approx(FORMS[form](2048), rel=1e-6)


def test_a_count_that_wavers_grows_as_its_course_does():
    assert growth(RANKS, [100, 103, 98, 101, 102]).form == "constant"
    assert growth(RANKS, [21, 39, 82, 161, 318]).form == "n"


def test_what_falls_is_what_it_was_in_the_largest_world():
    found = growth(RANKS, [100, 50, 25, 12, 6])
    assert (found.form, found.at(2048)) == ("constant", 6)


def worlds(**counts):
    """Return a measurement in which every rank counts so much of a name, by world, in a save."""
    return {
        str(n): {
            "lives": [{"save": {name.replace("_", "/"): [of(n)] * n for name, of in counts.items()}}, {}],
            "share_bytes": 1000,
            "layers": 5,
        }
        for n in RANKS
    }


def test_a_row_has_the_busiest_rank_and_all_ranks_in_its_unit():
    of = Target(2048, 2048 * 1_000_000, 8)
    found = {
        row.what: row
        for row in rows_of(
            worlds(
                opened_checkpoint=lambda n: 3,
                store_get=lambda n: 2 * n,
                written_checkpoint=lambda n: 2000,
                read_description=lambda n: 50 * n,
            )
        )
    }
    assert found["files opened of the checkpoint"].at(of) == pytest.approx((3, 3 * 2048))
    assert found["messages to the store"].at(of) == pytest.approx((2 * 2048, 2 * 2048**2))
    assert found["tensors written"].busiest == (2,) * 5  # shares
    assert found["tensors written"].at(of) == pytest.approx((2_000_000, 2_000_000 * 2048))
    assert found["descriptions read"].at(of) == pytest.approx((10 * 2048 * 8, 10 * 2048**2 * 8))  # of 10 bytes a layer
    assert [what for what, row in found.items() if row.stands_out] == ["descriptions read", "messages to the store"]


def test_what_grows_too_fast_stands_out_in_the_table():
    columns = {"before": worlds(store_get=lambda n: 2 * n), "after": worlds(store_get=lambda n: 5)}
    (row,) = (
        line
        for line in growth_table(columns, dict.fromkeys(columns, Target(2048, 1, 1))).splitlines()
        if "store" in line
    )
    assert row == (
        "| save | messages to the store | 64, 2.05k | **n**, **n^2** | 4.1k, 8.39M | 5, 160 | constant, n | 5, 10.2k |"
    )


def test_a_bound_is_met_by_all_worlds_or_not():
    names = ("read_over_checkpoint", "read_over_state", "written_over_even", "growth_over_share")
    bounds = dict.fromkeys((*names, "growth_beside_over_share"), 1.0)
    columns = {"x": {"4": {"bounds": bounds}, "8": {"bounds": bounds | {"read_over_state": 1.31}}}}
    met = [line.split("|")[-2].strip() for line in bounds_table(columns).splitlines()[2:]]
    assert met == ["yes", "**no**", "yes", "yes", "yes"]


@pytest.mark.parametrize(
    "path, place",
    [
        ("/run/checkpoints/step_00000002/__0_0.distcp", "checkpoint"),
        ("/run/checkpoints/step_00000002", "checkpoint"),
        ("/run/checkpoints/.step_00000002.ab12-1.partial/.metadata", "description"),
        ("/run/checkpoints/.step_00000002.ab12-1.partial", "checkpoint"),
        ("/run/checkpoints/step_00000002/manifest.json", "description"),
        ("/run/metrics.jsonl", "run"),
        ("/elsewhere", None),
    ],
)
def test_a_path_belongs_to_tensors_or_to_what_describes_them(path, place):
    assert place_of(path, "/run") == place


def test_the_page_shows_what_was_measured():
    """To renew: python -m benchmarks.at_scale measure=false"""
    page = (ROOT / "docs" / "scale.md").read_text()
    assert with_tables(page, RESULTS) == page


def test_the_checkpoint_that_is_reckoned_has_the_bytes_of_those_measured():
    for column in RESULTS["columns"].values():
        worlds = column["worlds"]
        each = bytes_of_a_parameter(worlds)
        for world, one in worlds.items():  # a parameter takes the same in every world
            assert one["share_bytes"] * int(world) == pytest.approx(one["parameters"] * each, rel=0.02)
        assert target(worlds).checkpoint_bytes == pytest.approx((671_026_404_352 + 11_610_067_968) * each)
        assert 14 <= each < 20  # BF16 weight, float32 master, two moments in BF16 or float32, float32 average


def test_messages_of_full_meshes_are_those_counted():
    """The formula that is used for 2,048 ranks, at every world that was run with full meshes."""
    for one in RESULTS["columns"]["before"]["worlds"].values():
        sent = sum(ranks[0] for name, ranks in one["lives"][0]["start"].items() if name.startswith("store/"))
        assert mesh_messages([size for _, size in one["joined"]]) == sent


def test_groups_of_a_world_without_messages_are_those_of_real_ranks():
    found = groups_of(words_of(4), 4)
    start = RESULTS["columns"]["before"]["worlds"]["4"]["lives"][0]["start"]
    gloo_twins = 2 + 2 + 4  # of both kinds of data-parallel groups and of those of experts, which "before" had
    assert found["calls"] == start["groups/called"][0] - gloo_twins
    assert len(found["joined"]) - 1 == start["groups/joined"][0] - 3


def test_writing_tables_anew_leaves_the_words_between_them():
    page = "a\n<!-- table sizes -->\n<!-- end -->\nb\n<!-- table imports -->\nold\n<!-- end -->\nc\n"
    once = with_tables(page, RESULTS)
    assert [line for line in once.splitlines() if not line.startswith(("|", "<"))] == ["a", "", "", "b", "", "", "c"]
    assert "old" not in once and with_tables(once, RESULTS) == once
