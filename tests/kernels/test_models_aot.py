"""Whole quantized models compiled for machines that are not here: the kernels are in the program, and no float weight is."""

import importlib.util

import pytest

NEEDED = {"v6e": ("libtpu",), "h200": ("jax_cuda13_plugin", "absl")}
SHIPPED, LAYER = 4 * 7, 7  # products with a packed weight
ROTATED = {"rotate_and_quantize": 1, "codes_product": 1}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("v6e", ({"weight_only": SHIPPED}, {"weight_only": LAYER}, {"rounded_product_int8": LAYER}, {"experts": 1}, ROTATED)),
        # Of a layer q, k, v and out, 4096 x 4096, make digits of their rows.
        ("h200", ({"hopper_weight_only": SHIPPED}, {"hopper_digits": 4, "hopper_weight_only": LAYER - 4}, {"hopper_eight_bit": LAYER})),
    ],
)
def test_every_packed_product_is_a_kernel_of_the_compiled_program(target, expected, rows_of):
    missing = [name for name in NEEDED[target] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing} are not installed: pip install -e '.[aot]'")
    rows = rows_of("model_static.py", "--target", target)
    rows, steps = rows[: len(expected)], rows[len(expected) :]
    assert [row["model"] for row in rows] == ["shipped", "7B layer, decode", "7B layer, prefill", "experts", "rotated"][: len(expected)]
    for row, kernels in zip(rows, expected, strict=True):
        assert row["kernels"] == kernels, row
        assert row["temporaries"] < row["float_weight"], row
    if target == "v6e":
        models = "shipped, decode", "7B layer, decode"
        assert [(row["model"], row["spec"]) for row in steps] == [(model, spec) for model in models for spec in ("KV8", "KV4")]
        for row in steps:
            layers = 4 if row["model"] == "shipped, decode" else 1
            assert row["kernels"] == {"weight_only": LAYER * layers, "decode_attention": layers}, row
            # No float copy of it, nor one of codes: what is there is smaller than the keys of a layer, and the cache changes where it is.
            assert row["temporaries"] < row["packed_cache"] / (2 * layers) / 2, row
            assert row["updated_in_place"] >= row["packed_cache"], row
