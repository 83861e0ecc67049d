"""Triton kernels for GPUs; what each computes is also written in plain torch, for every other machine."""
