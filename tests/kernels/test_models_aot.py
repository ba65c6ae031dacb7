"""Whole quantized models compiled for machines that are not here: the kernels are in the program, and no float weight is."""

import importlib.util

import pytest

NEEDED = {"v6e": ("libtpu",), "h200": ("jax_cuda13_plugin", "absl")}
SHIPPED, LAYER = 4 * 7, 7  # products with a packed weight

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("v6e", ({"weight_only": SHIPPED}, {"weight_only": LAYER}, {"rounded_product_int8": LAYER}, {"experts": 1})),
        ("h200", ({"hopper_few_rows": SHIPPED}, {"hopper_few_rows": LAYER}, {"hopper_eight_bit": LAYER})),
    ],
)
def test_every_packed_product_is_a_kernel_of_the_compiled_program(target, expected, rows_of):
    missing = [name for name in NEEDED[target] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing} are not installed: pip install -e '.[aot]'")
    rows = rows_of("model_static.py", "--target", target)
    assert [row["model"] for row in rows] == ["shipped", "7B layer, decode", "7B layer, prefill", "experts"][: len(expected)]
    for row, kernels in zip(rows, expected, strict=True):
        assert row["kernels"] == kernels, row
        assert row["temporaries"] < row["float_weight"], row
