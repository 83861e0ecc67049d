"""Kernels in Triton for what torch has no product or only many passes for, each beside a plain reference for a CPU."""
