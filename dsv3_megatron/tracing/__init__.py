"""Which documents a step of a run has read."""
