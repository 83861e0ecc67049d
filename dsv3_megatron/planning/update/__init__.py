"""The end of a step, from shapes alone: which numbers every rank updates, and what Muon moves for it."""
