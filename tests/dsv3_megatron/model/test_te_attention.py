"""Which attention Transformer Engine would take, asked of its own Python; cuDNN's answer is given by hand."""

import pytest
import torch

from testing.ranks import TE, run_ranks

REFUSED = "cudnn_status: CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"
FUSED = {"fused": (True, [True, True, True]), "refused": (False, [False, False, True])}


def ask(case):
    """Return what the product says on this rank, and that it left TE's loggers as they were."""
    import logging

    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from testing.te.project import asked_of_te

    dtype, cudnn = case
    te.DotProductAttention(2, (192, 128))  # gives its logger a level and a handler
    logger, stand_in = logging.getLogger("DotProductAttention"), utils.get_attention_backend
    state = logger.level, logger.propagate, list(logger.handlers), utils.AttentionLogging._log_level

    def answered(params):
        """The stand-in serves by TE's unfused attention; the answer is what a GPU's would be."""
        found = stand_in(params)
        fused, available = FUSED[cudnn]
        if params.qkv_dtype is torch.bfloat16 and not fused:
            logger.debug("Disabling FusedAttention: %s", REFUSED)
        return (False, None, fused, 1 if fused else None, found[4], available)

    utils.get_attention_backend = answered
    try:
        said = asked_of_te(2, 192, 128, dtype, torch.device("cpu"))
    finally:
        utils.get_attention_backend = stand_in
    assert (logger.level, logger.propagate, list(logger.handlers), utils.AttentionLogging._log_level) == state
    return said


@pytest.fixture(scope="module")
def said():
    cases = [(torch.bfloat16, "fused"), (torch.bfloat16, "refused"), (torch.float32, "refused")]
    return [found for (found,) in run_ranks(1, ask, cases, preload=TE)]


def test_nothing_is_said_where_a_fused_kernel_serves(said):
    assert said[0] is None


def test_the_reason_is_tes_own(said):
    assert said[1] == REFUSED
    assert said[2].startswith("for unsupported qkv_dtype = torch.float32")
