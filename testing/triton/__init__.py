"""Triton on a machine without a GPU: its interpreter runs the kernels, its compiler makes a GPU's code of them."""
