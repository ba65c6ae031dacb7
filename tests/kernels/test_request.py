"""What a product asks of a kernel: a device that no kernel is written for under that name is refused."""

import pytest
from qjax_kernels.request import Device


@pytest.mark.parametrize(
    ("platform", "chip", "message"),
    [
        ("gpu", "sm_90a", "`platform` is 'gpu'; write 'cuda'"),
        ("CUDA", "sm_90a", "`platform` is 'CUDA'; write 'cuda'"),
        ("TPU", "v6e", "write 'tpu'"),
        ("cuda", "h200", "`chip` is 'h200'; a GPU is called as code is compiled for it: .*'sm_90a'"),
        ("cuda", "sm_90", "`chip` is 'sm_90'"),
        ("cuda", "sm_80a", "`chip` is 'sm_80a'"),
    ],
)
def test_another_spelling_is_refused(platform, chip, message):
    with pytest.raises(ValueError, match=message):
        Device(platform, chip)


@pytest.mark.parametrize(
    ("platform", "chip"),
    [
        ("cuda", "sm_75"),
        ("cuda", "sm_89"),
        ("cuda", "sm_90a"),
        ("cuda", "sm_121a"),
        ("cuda", "unknown"),
        ("tpu", "TPU v4"),
        ("rocm", "gfx942"),
    ],
)
def test_chips_without_kernels_have_names(platform, chip):
    assert Device(platform, chip).cores == 1
