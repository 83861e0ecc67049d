"""Batch jobs: what to ask SLURM for, the script, the calls, what became of them. Nothing else reads SLURM."""
