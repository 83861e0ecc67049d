"""The kernels by the names under which Transformer Engine calls them. Slow, plain, and strict about operands."""

from testing.te.kernels.attention import (
    aligned_causal_softmax,
    masked_softmax,
    softmax_backward,
    upper_triangular_softmax,
)
from testing.te.kernels.gemm import generic_gemm, grouped_gemm
from testing.te.kernels.held import compute_partial_amax, compute_scale_and_scale_inv, partial_cast
from testing.te.kernels.norm import rmsnorm_backward, rmsnorm_forward
from testing.te.kernels.optimizer import adam, adam_with_remainders, l2norm, scale
from testing.te.kernels.quantise import create_empty, quantize, split_quantize
from testing.te.kernels.rows import pad, unpad
from testing.te.kernels.whole import transpose, update_amax_and_scale

KERNELS = {
    "create_empty_quantized_tensor": create_empty,
    "fp8_block_scaling_compute_partial_amax": compute_partial_amax,
    "fp8_block_scaling_partial_cast": partial_cast,
    "fp8_transpose": transpose,
    "fused_amax_and_scale_update_after_reduction": update_amax_and_scale,
    "fused_multi_row_padding": pad,
    "fused_multi_row_unpadding": unpad,
    "generic_gemm": generic_gemm,
    "multi_tensor_adam": adam,
    "multi_tensor_adam_param_remainder": adam_with_remainders,
    "multi_tensor_compute_scale_and_scale_inv": compute_scale_and_scale_inv,
    "multi_tensor_l2norm": l2norm,
    "multi_tensor_scale": scale,
    "quantize": quantize,
    "rmsnorm_bwd": rmsnorm_backward,
    "rmsnorm_fwd": rmsnorm_forward,
    "scaled_aligned_causal_masked_softmax_backward": softmax_backward,
    "scaled_aligned_causal_masked_softmax_forward": aligned_causal_softmax,
    "scaled_masked_softmax_backward": softmax_backward,
    "scaled_masked_softmax_forward": masked_softmax,
    "scaled_upper_triang_masked_softmax_backward": softmax_backward,
    "scaled_upper_triang_masked_softmax_forward": upper_triangular_softmax,
    "split_quantize": split_quantize,
    "te_general_grouped_gemm": grouped_gemm,
}
