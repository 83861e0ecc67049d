"""A stand-in for NCCL and CUDA streams, over gloo and CPU tensors: it refuses and delays what they refuse and delay."""
