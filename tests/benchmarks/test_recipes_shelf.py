"""docs/recipes_shelf.md is what the planner says."""

from benchmarks.recipes_shelf import FITS, PAGE, PURPOSES, plan_of, with_tables
from launcher.command_line.recipe_files import RECIPES

ROOT = RECIPES.parent


def test_the_page_is_in_step_with_the_planner():
    """To renew: python -m benchmarks.recipes_shelf."""
    page = (ROOT / PAGE).read_text()
    assert with_tables(page) == page


def test_what_is_offered_fits():
    assert all(plan_of(row.words).fits for row in PURPOSES)
    assert not all(plan_of(row.words).fits for row in FITS), "the table shows what does not, too"
