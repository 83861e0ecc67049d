"""The table of docs/checkpoints.md on failures and saves is what the planner says."""

from benchmarks.goodput_table import PAGE, ROWS, with_table


def test_the_table_is_what_the_planner_says():
    """To renew: python -m benchmarks.goodput_table."""
    page = PAGE.read_text()
    assert page == with_table(page)
    assert sum(page.count(f"| `{words}` |") for words in ROWS) == len(ROWS)
