"""What a step reads: samples in a reproducible order."""
