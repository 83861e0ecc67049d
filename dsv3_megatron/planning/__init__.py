"""Knows that a run fits, and how fast it will be, before it is submitted."""
