"""What the Hopper kernels refuse, and how they name it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from qjax_kernels.gpu import eight_bit, weight_only
from qjax_kernels.gpu.order import by_threads
from qjax_kernels.gpu.tiles import Direct, Tiles
from qjax_kernels.request import Device, Request, Weight

HOPPER = Device("cuda", "sm_90a", 132)


def test_blocks_that_stay_take_no_split():
    x, how = jnp.ones((64, 1024), jnp.bfloat16), {"split_k": 2, "warpgroups": 2}
    four, eight = jnp.zeros((128, 1024), jnp.int4), jnp.zeros((128, 1024), jnp.int8)
    run = functools.partial(weight_only.weight_only_matmul, group_size=128, tiles=Tiles(64, 128, 128, 2, scale_first=True, **how))
    with pytest.raises(ValueError, match="leave it 1"):
        jax.eval_shape(run, x, four, jnp.ones((128, 8)))
    with pytest.raises(ValueError, match="leave it 1"):
        run = functools.partial(eight_bit.eight_bit_matmul, tiles=Tiles(128, 64, 128, 2, x_left=True, **how))
        jax.eval_shape(run, x, eight, jnp.ones(128))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x": jnp.zeros((2, 256), jnp.float32)}, "`x` is float32"),
        ({"x": jnp.zeros((2, 3, 256), jnp.bfloat16)}, "`x` is bfloat16"),
        ({"x": jnp.zeros((2, 512), jnp.bfloat16)}, "`codes` are int4"),
        ({"codes": jnp.zeros((64, 256), jnp.uint4)}, "`codes` are uint4"),
        ({"codes": jnp.zeros((72, 256), jnp.int4), "scales": jnp.ones((72, 2))}, "multiple of 64"),
        ({"scales": jnp.ones(64), "group_size": None}, "`scales` are float32"),
        ({"codes": jnp.zeros((64, 272), jnp.int4), "x": jnp.zeros((2, 272), jnp.bfloat16)}, "K of 128"),
        ({"group_size": 64}, "`group_size` is 64"),
        ({"group_size": 384}, "`group_size` is 384"),
        ({"scales": jnp.ones((64, 1))}, r"\(64, 2\), K / `group_size` = 256 / 128 to a row; 1 to a row are those of `group_size` 256"),
        ({"scales": jnp.ones((64, 2)), "group_size": None}, "2 columns and `group_size` is None"),
        ({"scales": jnp.ones((64, 2), jnp.bfloat16), "group_size": 256}, r"\(64, 1\), K / `group_size` = 256 / 256"),
        ({"scales": jnp.ones((64, 8), jnp.bfloat16)}, r"\(64, 2\)"),  # a row of 16 bytes, of which nobody said so
        ({"padded_scales": True}, r"\(64, 4\).*zeros up to a multiple of 4"),
        ({"scales": jnp.ones((64, 16), jnp.bfloat16), "padded_scales": True}, r"\(64, 8\).*zeros up to a multiple of 8"),
        ({"scales": jnp.ones((64, 2), jnp.int8)}, "`scales` are int8"),
        ({"bias": jnp.ones((63,))}, "`bias` is float32"),
        ({"bias": jnp.ones((64,), jnp.int32)}, "`bias` is int32"),
    ],
)
def test_operands_that_do_not_fit_together_are_refused(changed, named):
    pytest.importorskip("absl")
    given = {"x": jnp.zeros((2, 256), jnp.bfloat16), "codes": jnp.zeros((64, 256), jnp.int4), "scales": jnp.ones((64, 2))}
    with pytest.raises(ValueError, match=named):
        weight_only.weight_only_matmul(**{**given, "group_size": 128, **changed})


@pytest.mark.parametrize(
    ("rows", "scales", "named"),
    [
        (jnp.zeros((9, 256), jnp.int8), jnp.ones(9), "multiple of 8"),
        (jnp.zeros((8, 256), jnp.int8), jnp.ones(3), "`row_scales` are float32"),
        (jnp.zeros((8, 256), jnp.float8_e4m3fn), jnp.ones(8), "of one type"),
    ],
)
def test_rounded_rows_that_do_not_fit_are_refused(rows, scales, named):
    with pytest.raises(ValueError, match=named):
        eight_bit.scaled_product(rows, scales, jnp.zeros((64, 256), jnp.int8), jnp.ones(64), out_dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("codes", "scales", "bias", "named"),
    [
        (jnp.zeros((64, 256), jnp.int4), jnp.ones(64), None, "`codes` are int4"),
        (jnp.zeros((64, 128), jnp.int8), jnp.ones(64), None, r"rows are \(2, 256\)"),
        (jnp.zeros((72, 256), jnp.int8), jnp.ones(72), None, "multiple of 64"),
        (jnp.zeros((64, 256), jnp.int8), jnp.ones(63), None, "one a row"),
        (jnp.zeros((64, 256), jnp.int8), jnp.ones((1, 64)), None, "one a row"),
        (jnp.zeros((64, 256), jnp.int8), jnp.ones(64, jnp.int8), None, "`scales` are int8"),
        (jnp.zeros((64, 256), jnp.int8), jnp.ones((64, 2)), None, "one a row"),
        (jnp.zeros((64, 256), jnp.int8), jnp.ones(64), jnp.ones((1, 64)), "`bias` is float32"),
    ],
)
def test_operands_of_eight_bits_that_do_not_fit_together_are_refused(codes, scales, bias, named):
    with pytest.raises(ValueError, match=named):
        eight_bit.eight_bit_matmul(jnp.zeros((2, 256), jnp.bfloat16), codes, scales, bias=bias)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(Device("cuda", "sm_80"), 1, 64, 1024, Weight("int", 4, 128)), "sm_90a"),
        (Request(HOPPER, 1, 64, 1024, Weight("int", 3, 128)), "int3"),
        (Request(HOPPER, 1, 64, 1024, Weight("int", 4, 64)), "64"),
        (Request(HOPPER, 1, 100, 1024, Weight("int", 4, 128)), "100"),
        (Request(HOPPER, 1, 64, 1152, Weight("int", 4, 256)), "not a multiple of the group"),
        (Request(HOPPER, 1, 64, 1024, Weight("int", 4, 128), dtype="float32"), "float32"),
    ],
)
def test_why_not_names_the_obstacle(request_, named):
    assert named in weight_only.why_not(request_)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_m": 7}, "`block_m` is 7; it must"), ({"block_n": 96}, "`block_n` is 96"), ({"block_k": 64}, "`block_k` is 64; it must"),
        ({"stages": 0}, "`stages` is 0; it starts at 1"), ({"split_k": 0}, "`split_k` is 0; it starts at 1"),
        ({"warpgroups": 0}, "`warpgroups` is 0; it starts at 1"), ({"cluster": 0}, "`cluster` is 0; it starts at 1"),
        ({"cluster": 2}, "`cluster` is 2 with 1 warpgroups; clusters need"), ({"warpgroups": 3}, "`block_n` is 64 with 3 warpgroups"),
        ({"block_n": 512}, "`block_n` is 512; the copy engine"), ({"block_n": 256, "warpgroups": 4}, "`warpgroups` is 4: .* take 2 or 3"),
        ({"block_n": 128, "warpgroups": 2, "cluster": 3}, "`cluster` is 3 and `block_m` 8"),
        ({"block_m": 128, "block_n": 128, "warpgroups": 2, "cluster": 16}, "`cluster` is 16"),
        ({"digits": True}, "`warpgroups` is 1; `digits` needs two"),
        ({"digits": True, "warpgroups": 2, "block_n": 128, "cluster": 2}, "`cluster` is 2; .* give `split_k`"),
        ({"digits": True, "warpgroups": 2, "block_n": 128, "scale_first": True}, "leave `scale_first` False"),
        ({"digits": True, "warpgroups": 2, "block_n": 128, "block_m": 40}, "`block_m` is 40; with `digits` it must be 32"),
        ({"digits": True, "warpgroups": 2}, "`block_k` is 128; 2 warpgroups share it, so it must be a multiple of 256"),
        ({"digits": True, "warpgroups": 2, "block_n": 96}, "`block_n` is 96 .* multiple of 128, 64 rows for each, or 64"),
        ({"digits": True, "warpgroups": 3, "block_n": 128}, "`block_n` is 128 .* multiple of 192"),
        ({"digits": True, "warpgroups": 7, "block_k": 896}, "`warpgroups` is 7: .* take 2 or 3"),
        ({"digits": True, "warpgroups": 2, "block_n": 128, "split_k": 9}, "`split_k` is 9; with `digits` 8"),
    ],
)  # fmt: skip
def test_tiles_refuse_what_no_kernel_has(fields, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**({"block_m": 8, "block_n": 64, "block_k": 128, "stages": 2} | fields))


@pytest.mark.parametrize("fields", [{"block_m": 8.0}, {"stages": True}, {"x_left": 1}, {"cluster": "2"}])
def test_fields_of_tiles_that_are_of_another_type_are_refused(fields):
    (name,) = fields
    with pytest.raises(TypeError, match=f"`{name}` is {fields[name]!r}; it must be"):
        Tiles(**({"block_m": 8, "block_n": 64, "block_k": 128, "stages": 2} | fields))


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"tiles": "fast"}, TypeError, "`tiles` are 'fast'; take"),
        ({"cores": 0}, ValueError, "`cores` is 0"),
        ({"cores": 132.0}, ValueError, "`cores` is 132.0"),
    ],
)
@pytest.mark.parametrize("name", ["weight-only", "eight bits"])
def test_a_cut_that_is_none_is_refused(name, changed, error, named):
    x, w = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8)
    with pytest.raises(error, match=named):
        if name == "weight-only":
            weight_only.weight_only_matmul(x, w, jnp.ones((64, 2), jnp.bfloat16), group_size=128, **changed)
        else:
            eight_bit.eight_bit_matmul(x, w, jnp.ones(64, jnp.bfloat16), **changed)


def test_tiles_of_single_warps_are_refused_for_eight_bits_on_both_sides():
    with pytest.raises(TypeError, match=r"take Tiles\(...\), or None"):
        eight_bit.eight_bit_matmul(jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8), jnp.ones(64), tiles=Direct())


@pytest.mark.parametrize(
    ("norm", "error"), [("1e-5", TypeError), (True, TypeError), (-1e-5, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)]
)
def test_a_norm_that_is_none_is_refused(norm, error):
    x, w, s = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8), jnp.ones((64, 2), jnp.bfloat16)
    with pytest.raises(error, match="`norm` is"):
        weight_only.weight_only_matmul(x, w, s, group_size=128, norm=norm)


def test_switches_of_other_kernels_are_refused():
    x, w = jnp.ones((64, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8)
    with pytest.raises(ValueError, match=r"`tiles\.x_left` is True"):
        weight_only.weight_only_matmul(x, w, jnp.ones((64, 1)), tiles=Tiles(64, 64, 128, 2, x_left=True))
    for name in ("digits", "scale_first"):
        with pytest.raises(ValueError, match=rf"`tiles\.{name}` is True"):
            eight_bit.eight_bit_matmul(x, w, jnp.ones(64), tiles=Tiles(32, 128, 128, 2, warpgroups=2, **{name: True}))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.bool_, jnp.float8_e4m3fn, jnp.complex64])
def test_rows_of_eight_bits_that_are_no_floats_are_refused(dtype):
    with pytest.raises(ValueError, match=r"`x` is .*must be bfloat16, float16 or float32"):
        eight_bit.eight_bit_matmul(jnp.ones((1, 256), dtype), jnp.ones((64, 256), jnp.int8), jnp.ones(64))


@pytest.mark.parametrize("group", [128.0, "128", 64])
def test_groups_that_are_none_are_refused(group):
    x, w = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8)
    with pytest.raises(ValueError, match=f"`group_size` is {group!r}"):
        weight_only.weight_only_matmul(x, w, jnp.ones((64, 2)), group_size=group)


@pytest.mark.parametrize("name", ["x", "codes", "scales", "bias"])
def test_what_is_no_array_is_refused_by_its_name(name):
    given = {"x": jnp.ones((1, 256), jnp.bfloat16), "codes": jnp.ones((64, 256), jnp.int8)}
    given |= {"scales": jnp.ones((64, 1)), "bias": jnp.ones(64)}
    for function in (weight_only.weight_only_matmul, eight_bit.eight_bit_matmul):
        with pytest.raises(TypeError, match=f"`{name}` is list .*must be an array"):
            function(**{**given, name: [1.0, 2.0]})


def test_what_is_no_switch_and_no_interpreter_is_refused():
    x, w, s = jnp.ones((1, 256), jnp.bfloat16), jnp.ones((64, 256), jnp.int8), jnp.ones((64, 1))
    for interpret in (True, False, "yes"):
        for function in (weight_only.weight_only_matmul, eight_bit.eight_bit_matmul):
            with pytest.raises(TypeError, match=f"`interpret` is {interpret!r}; it must be None"):
                function(x, w, s, interpret=interpret)
    with pytest.raises(TypeError, match="`padded_scales` is 'no'"):
        weight_only.weight_only_matmul(x, w, s, padded_scales="no")


def test_digits_are_refused_for_other_codes_before_their_memory_is_counted():
    x, tiles = jnp.ones((16, 1024), jnp.bfloat16), Tiles(16, 256, 512, 2, warpgroups=2, digits=True)
    for codes, scales, group in ((jnp.int8, (256, 8), 128), (jnp.int4, (256, 1), None)):
        with pytest.raises(ValueError, match=r"`tiles\.digits` is True with codes of \d bits and `group_size` .*; it is for 4 bits"):
            w, s = jnp.zeros((256, 1024), codes), jnp.ones(scales, jnp.bfloat16)
            weight_only.weight_only_matmul(x, w, s, group_size=group, tiles=tiles)


def test_codes_that_cannot_lie_by_threads_are_refused():
    with pytest.raises(TypeError, match="`codes` is list"):
        by_threads([1, 2])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"`codes` are int4 \(2, 48\); the last axis must be a multiple of 32"):
        by_threads(jnp.zeros((2, 48), jnp.int4))


@pytest.mark.parametrize("k", [256, 1024, 2048])
def test_a_forgotten_group_size_is_named(k):
    x, w = jnp.ones((1, k), jnp.bfloat16), jnp.ones((64, k), jnp.int8)
    with pytest.raises(ValueError, match=f"{k // 128} columns and `group_size` is None"):
        weight_only.weight_only_matmul(x, w, jnp.ones((64, k // 128), jnp.bfloat16))


@pytest.mark.parametrize(("n", "k"), [(0, 256), (64, 0)])
def test_weights_of_nothing_are_refused(n, k):
    x, w = jnp.ones((1, k), jnp.bfloat16), jnp.ones((n, k), jnp.int8)
    with pytest.raises(ValueError, match="neither 0"):
        weight_only.weight_only_matmul(x, w, jnp.ones((n, 1), jnp.bfloat16))
    with pytest.raises(ValueError, match="neither 0"):
        eight_bit.eight_bit_matmul(x, w, jnp.ones(n))
