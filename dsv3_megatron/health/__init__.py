"""The health of a run: steps that are not taken, slow ranks, and a stop that all ranks agree on."""
