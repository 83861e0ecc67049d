"""What the ranks of a run read, and how they make it ready."""
