"""What happens beside the steps of a run, one thing in a file."""
