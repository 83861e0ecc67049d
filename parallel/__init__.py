"""Ranks, tensors and time: layouts, process groups and pipeline schedules. Knows nothing of models."""
