"""Checkpoints in host memory, which outlives a process, with a copy of each rank's share on another node."""
