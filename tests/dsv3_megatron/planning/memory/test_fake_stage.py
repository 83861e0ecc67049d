"""The exact path leaves nothing fake behind for what runs after it in the same process."""

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch._subclasses.fake_tensor import FakeTensor

from dsv3_megatron.planning.plan import make_plan
from launcher.command_line.compose import compose


def test_a_plan_leaves_no_fake_tensor_in_megatron_cores_classes():
    make_plan(compose(["recipe=dsv3_tiny"]), 1)
    held = [scaler.main_loss_backward_scale for scaler in (MoEAuxLossAutoScaler, MTPLossAutoScaler)]
    assert not [x for x in (*held, *MTPLossLoggingHelper.tracker.values()) if isinstance(x, FakeTensor)]
