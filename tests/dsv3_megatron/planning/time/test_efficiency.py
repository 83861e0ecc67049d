"""What kernels reach: the published points themselves, and what a GPU of another architecture does otherwise."""

import pytest

from dsv3_megatron.planning.time.efficiency import BLACKWELL, HOPPER
from dsv3_megatron.planning.time.roofline import Device
from launcher.command_line.compose import compose


def device(cluster: str) -> Device:
    return Device(compose(["recipe=dsv3_671b", f"cluster={cluster}"]).cluster)


@pytest.mark.parametrize(("head", "rate"), [(128, 579), (256, 612)])
def test_attention_takes_what_flash_attention_3_publishes(head, rate):
    assert HOPPER.attention_forward(4 * head) * 989.5 == pytest.approx(rate)


def test_heads_of_192_and_128_lie_between_the_published_ones():
    assert 579 < HOPPER.attention_forward(2 * (192 + 128)) * 989.5 < 612


def test_grouped_products_take_what_megatron_core_reports_on_gb200():
    gpu, rows = device("gb200_256"), 128 * 152  # full waves
    seconds = gpu.product(rows, 128 * 16, 7168, "fp8")
    assert 2 * rows * 128 * 16 * 7168 / seconds / 1e12 == pytest.approx(2672, rel=0.01)


def test_weight_gradients_in_fp8_are_products_like_others_where_tensor_cores_apply_the_scales():
    sizes = (7168, 2048, 32768)
    hopper, blackwell = device("h800_2048"), device("gb200_256")
    added = blackwell.memory(8 * 7168 * 2048)
    assert blackwell.weight_gradient(*sizes, "fp8") == pytest.approx(blackwell.product(*sizes, "fp8") + added)
    assert hopper.weight_gradient(*sizes, "fp8") > 1.5 * hopper.product(*sizes, "fp8")


def test_attention_of_blackwell_is_what_flash_mla_publishes_less_what_causal_masks_cost():
    assert BLACKWELL.attention_forward(640) * 2250 == pytest.approx(1460 * 579 / 648)
    gpu = device("b200_256")
    assert gpu.attention_backward(1e9, 640) == pytest.approx(640e9 / (1000e12 * 579 / 648))


@pytest.mark.parametrize(
    ("cluster", "numbers", "published"), [("h800_2048", 4096 * 8192, 302e-6), ("b200_256", 8192 * 4096, 63.8e-6)]
)
def test_the_backward_of_a_norm_takes_what_liger_kernel_publishes(cluster, numbers, published):
    gpu = device(cluster)
    assert gpu.norm_backward(3 * 2 * numbers) == pytest.approx(published, rel=0.01)
    assert gpu.norm_backward(3 * 2 * numbers) > gpu.memory(3 * 2 * numbers)
