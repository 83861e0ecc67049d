"""Transformer Engine's own Python on a CPU: its wheel, over kernels written in Python. Begin with README.md."""
