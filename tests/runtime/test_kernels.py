"""Which kernel runs a product, on plain kernels of our own that mark what went through them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels.request import Device, Request, Weight

import qjax
from qjax.core import OnlineRotation, QTensor, pack, quantize, unpack
from qjax.runtime import Codes, Kernel, Layout, Operands, Runtime, choose
from qjax.runtime.quantized import quantized
from qjax.runtime.select import kernel_of
from tests.program.cases import normal

HERE = Device("cpu", "plain")


def weights(request, operands):
    """What the codes stand for, float32 (..., N, K): the plainest decoder there is."""
    w, k = request.weight, request.k
    codes = operands.codes if w.bits == 8 else unpack(operands.codes, w.bits, k, w.kind == "int")
    if w.kind == "fp8":
        values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    elif w.kind == "codebook":
        values = operands.levels[codes.astype(jnp.int32)]
    else:
        values = codes.astype(jnp.float32)
    group = k // operands.scale.shape[-1] if w.group_size is None else w.group_size
    assert group * operands.scale.shape[-1] == k
    if operands.zero_point is not None:
        values = values - jnp.repeat(operands.zero_point.astype(jnp.float32), group, axis=-1)
    return values * jnp.repeat(operands.scale, group, axis=-1)


def marked(x):
    """The same numbers, and a mark in the program that XLA keeps."""
    return jax.lax.reduce_precision(x, 8, 23) if x.dtype == jnp.float32 else x


def run(request, operands, act):
    assert operands.x.dtype == request.dtype
    lead = () if request.parts == 1 else (request.parts,)
    assert operands.x.shape == (*lead, request.m, request.k)
    w = weights(request, operands)
    assert w.shape == (*lead, request.n, request.k)
    y = jnp.einsum("...mk,...nk->...mn", operands.x.astype(jnp.float32), w, precision="highest")
    return marked(y).astype(request.dtype)


def why_not(request, most=1 << 20):
    if request.activation is not None:
        return "it rounds no activations"
    return f"{request.m} rows, {most} at most" if request.m > most else ""


PLAIN = Kernel("plain w", "cpu", why_not, run)
KERNELS = (Kernel("for tpu", "tpu", why_not, run), Kernel("few rows", "cpu", functools.partial(why_not, most=4), run), PLAIN)
ON = {"kernels": (PLAIN,), "device": HERE}


def both(fn, params, *inputs, **how):
    """Through the kernel, compared with the function of the dequantized weights."""
    lowered = jax.jit(quantized(fn, **{**ON, **how})).lower(params, *inputs)
    assert "reduce_precision" in lowered.as_text()
    got = lowered.compile()(params, *inputs)
    want = fn(jax.tree.map(lambda q: q.dequantize(), params, is_leaf=lambda q: isinstance(q, QTensor)), *inputs)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (got, want)), rtol=2e-5, atol=2e-5)
    return got


SPECS = [
    qjax.int8(),
    qjax.int4(group_size=8),
    qjax.int4(group_size=7, pad=True),
    qjax.uint4(group_size=8),
    qjax.uint8(),
    qjax.int3(),
    qjax.int2(per="tensor"),
    qjax.ternary(),
    qjax.nf4(group_size=8, double_quant=True),
    qjax.mxfp4(pad=True),
    qjax.nvfp4(pad=True),
    qjax.mxint8(pad=True),
    qjax.mxfp6(pad=True),
    qjax.fp8_e4m3(),
    qjax.learned(3, per="tensor"),
    qjax.learned(3, group_size=8),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_format_reaches_a_kernel_as_plain_arrays(spec):
    both(lambda p, x: x @ p["w"], {"w": quantize(normal(24, 10), spec, (0,))}, normal(3, 24, seed=1))






FORMS = {
    "x @ w": ("abk,kn->abn", (2, 3, 16), (16, 6)),
    "tied": ("bk,nk->bn", (3, 16), (6, 16)),
    "w @ x": ("kn,bk->nb", (16, 6), (3, 16)),
    "heads": ("bthd,hdm->btm", (2, 3, 4, 6), (4, 6, 5)),
    "to heads": ("btm,mhd->bthd", (2, 3, 8), (8, 4, 6)),
    "experts": ("etk,ekn->etn", (3, 2, 8), (3, 8, 5)),
    "batched heads": ("bthd,bhdm->btm", (2, 3, 4, 6), (2, 4, 6, 5)),
    "shared experts": ("tk,ekn->etn", (4, 8), (3, 8, 5)),
    "a row": ("k,kn->n", (8,), (8, 5)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_product(form):
    how, x, w = FORMS[form]
    if form == "w @ x":
        x, w = w, x

    def fn(p, x):
        return jnp.einsum(how, *((p["w"], x) if form == "w @ x" else (x, p["w"])))

    operands, out = how.split("->")
    axes = [i for i, a in enumerate(operands.split(",")[form != "w @ x"]) if a not in out]
    both(fn, {"w": quantize(normal(*w), qjax.int4(), axes)}, normal(*x, seed=1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit(dtype):
    def fn(p, x):
        return x @ p["w"]

    x = normal(3, 16).astype(dtype)
    packed = {"w": quantize(normal(16, 6).astype(dtype), qjax.int8(), (0,))}
    seen = []
    spy = Kernel("spy", "cpu", lambda r: seen.append(r) or "", run)
    got = jax.jit(quantized(fn, kernels=(spy,), device=HERE))(packed, x)
    want = np.asarray(x, np.float64) @ np.asarray(packed["w"].dequantize(), np.float64)
    assert got.dtype == dtype and seen[0].dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-2, atol=2e-2)


def test_act_order_input_scales_rotations_and_adapters_stay_what_they_are():
    q = quantize(normal(16, 6), qjax.int4(group_size=8), (0,))
    perm = jnp.asarray(np.random.default_rng(0).permutation(16)[None], jnp.int32)
    thin = qjax.Adapter(normal(6, 2, seed=3), normal(1, 2, 16, seed=4))
    forms = {"perm": perm, "input_scale": jnp.abs(normal(1, 16)) + 0.5, "rotation": OnlineRotation()}
    for name, value in forms.items():
        both(lambda p, x: x @ p["w"], {"w": dataclasses.replace(q, **{name: value})}, normal(3, 16, seed=2))
    whole = dataclasses.replace(q, **forms).with_adapter(thin)
    both(lambda p, x: x @ p["w"], {"w": whole}, normal(3, 16, seed=2))


# Choosing.

PRODUCT = Request(HERE, 1, 8, 8, Weight("int", 4))


def test_the_first_kernel_that_takes_it_is_chosen_and_the_others_say_why_not():
    chosen = choose(Request(HERE, 5, 8, 8, Weight("int", 4)), KERNELS)
    assert chosen.kernel is PLAIN and chosen.reasons == (("few rows", "5 rows, 4 at most"),)
    assert choose(PRODUCT, KERNELS).kernel is KERNELS[1]
    assert choose(Request(HERE, 5, 8, 8, Weight("int", 4), activation="int8"), KERNELS).kernel is None
    assert choose(PRODUCT, KERNELS, force="xla").kernel is None
    assert choose(PRODUCT, KERNELS, force="plain w").kernel is PLAIN


def test_forcing_what_cannot_run_is_an_error_that_says_why():
    def fn(p, x):
        return x @ p["up"]["w"]

    params = {"up": {"w": quantize(normal(8, 4), qjax.int4(), (0,))}}
    how = {"kernels": KERNELS, "device": HERE}
    with pytest.raises(ValueError, match="`kernel` 'few rows' cannot run up/w: 5 rows, 4 at most"):
        quantized(fn, kernel="few rows", **how)(params, normal(5, 8))
    with pytest.raises(ValueError, match="`kernel` 'for tpu' cannot run up/w: it is for tpu, and the program for cpu"):
        quantized(fn, kernel="for tpu", **how)(params, normal(5, 8))
    with pytest.raises(ValueError, match="`kernel` must be 'xla' or one of 'for tpu', 'few rows', 'plain w', got 'fast'"):
        quantized(fn, kernel="fast", **how)
    with pytest.raises(TypeError, match=r"`device` must be a qjax\.Device or a jax\.Device, got str"):
        quantized(fn, kernels=KERNELS, device="cpu")(params, normal(5, 8))
    with pytest.raises(TypeError, match=r"`kernels` must be a sequence of qjax\.runtime\.Kernel"):
        quantized(fn, kernels="plain w")(params, normal(5, 8))  # type: ignore[arg-type]
    for name in ("fuse", "donate"):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False, got 'yes'"):
            qjax.prepack(fn, **{name: "yes"})  # type: ignore[arg-type]


def test_a_convolution_is_a_product_of_its_windows_and_one_in_groups_says_that_it_is_none():
    def fn(p, x, groups=1):
        how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", **how)

    x = normal(1, 4, 4, 2)
    both(fn, {"w": quantize(normal(3, 3, 2, 4), qjax.int4(), (0, 1, 2))}, x)
    params, grouped = {"w": quantize(normal(3, 3, 1, 4), qjax.int4(), (0, 1, 2))}, functools.partial(fn, groups=2)
    with pytest.raises(ValueError, match="`kernel` 'plain w' cannot run w: a convolution in groups"):
        quantized(grouped, kernel="plain w", **ON)(params, x)
    assert "reduce_precision" not in jax.jit(quantized(grouped, **ON)).lower(params, x).as_text()


def test_what_the_kernels_have_no_word_for_goes_to_xla():
    def fn(p, x):
        return x @ p["w"]

    for spec in (qjax.int4(block=(4, 4)), qjax.uint4(zero_dtype="float32"), qjax.learned(3), qjax.bf16()):
        params = {"w": quantize(normal(16, 8), spec, (0,))}
        with pytest.raises(ValueError, match="`kernel` 'plain w' cannot run w: "):
            quantized(fn, kernel="plain w", **ON)(params, normal(2, 16))
        assert jax.jit(quantized(fn, **ON))(params, normal(2, 16)).shape == (2, 8)


def test_the_report_says_which_kernel_and_why_not_a_faster_one():
    def fn(p, x):
        return jnp.einsum("btd,vd->btv", jnp.take(p["e"], x, axis=0) @ p["w"], p["e"])

    params, x = {"e": normal(12, 8), "w": normal(8, 8)}, jnp.zeros((1, 5), jnp.int32)
    runtime = Runtime(HERE, KERNELS)
    program = qjax.trace(fn, params, x)
    packed = {"e": quantize(params["e"], qjax.int4(), (1,)), "w": quantize(params["w"], qjax.int4(), (0,))}
    rows = [kernel_of(site, qjax.int4(), None, packed[leaf.path], runtime) for leaf in program.leaves for site in leaf.sites]
    why = ("few rows: 5 rows, 4 at most",)
    assert rows == [("xla", "", ()), ("plain w", "", why), ("plain w", "", why)]
    (site,) = program.leaves[1].sites
    name, _, reasons = kernel_of(site, qjax.int4(), qjax.dynamic(qjax.int8()), packed["w"], runtime)
    assert name == "xla int8" and reasons == ("few rows: it rounds no activations", "plain w: it rounds no activations")
    assert kernel_of(site, qjax.bf16(), None, quantize(params["w"], qjax.bf16(), (0,)), runtime) == ("xla", "", ("bf16() has no codes",))


def test_the_table_has_kernels_only_where_there_are_some():
    report = qjax.sites(lambda p, x: x @ p, qjax.Policy([qjax.Rule("*", weight=qjax.int4())]))(normal(8, 4), normal(2, 8))
    assert "kernel" not in str(report)
    rows = [dataclasses.replace(report.rows[0], kernel=name, kernel_reasons=("a: no",)) for name in ("xla", "b")]
    text = str(qjax.Report(tuple(rows)))
    assert "kernel" in text and "xla (a: no)" in text and "b (a: no)" not in text


# Transformations.


def test_gradients_are_those_of_the_float_product_for_inputs_scales_and_adapters():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    x = normal(5, 16)
    thin = qjax.Adapter(normal(6, 2, seed=3), normal(1, 2, 16, seed=4))
    params = {"w": quantize(normal(16, 6), qjax.int4(group_size=8), (0,)).with_adapter(thin)}

    def loss(how):
        return lambda p, x: jnp.sum(quantized(fn, device=HERE, **how)(p, x) ** 2)

    grad = functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
    got, want = (jax.jit(grad(loss({"kernels": k})))(params, x) for k in ((PLAIN,), ()))
    assert "reduce_precision" in jax.jit(grad(loss({"kernels": (PLAIN,)}))).lower(params, x).as_text()
    for name in ("scale", "adapter_left", "adapter_right"):
        a, b = (np.asarray(getattr(g[0]["w"], name)) for g in (got, want))
        assert np.any(b != 0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


def test_vmap_makes_rows_of_what_it_maps_over():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(16, 6), qjax.int4(), (0,))}, normal(2, 4, 3, 16)
    rows = []
    spy = Kernel("spy", "cpu", lambda r: rows.append(r.m) or "", run)
    one = quantized(fn, kernels=(spy,), device=HERE)
    mapped = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (None, 0)))
    got = mapped(params, x)
    assert max(rows) == 24
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(params["w"].dequantize()), rtol=2e-5, atol=2e-5)
    assert "reduce_precision" in mapped.lower(params, x).as_text()
    gradient = jax.jit(jax.vmap(jax.grad(lambda p, x: jnp.sum(one(p, x) ** 2), argnums=1), (None, 0)))(params, x[0])
    w = np.asarray(params["w"].dequantize())
    np.testing.assert_allclose(gradient, 2 * np.asarray(x[0]) @ w @ w.T, rtol=1e-4, atol=1e-4)


def test_more_rows_than_it_takes_go_to_the_next_one_under_vmap():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(16, 6), qjax.int4(), (0,))}, normal(4, 3, 16)
    one = quantized(fn, kernels=(KERNELS[1],), device=HERE)
    assert "reduce_precision" in jax.jit(one).lower(params, x[0]).as_text()
    mapped = jax.jit(jax.vmap(one, (None, 0)))
    assert "reduce_precision" not in mapped.lower(params, x).as_text()
    np.testing.assert_allclose(mapped(params, x), np.asarray(x) @ np.asarray(params["w"].dequantize()), rtol=2e-5, atol=2e-5)


def test_vmapped_weights_go_to_xla():
    def fn(p, x):
        return x @ p["w"]

    params = {"w": quantize(normal(3, 16, 6), qjax.int4(), (1,), (0,))}
    x = normal(3, 2, 16)
    mapped = jax.jit(jax.vmap(quantized(fn, **ON)))
    want = np.einsum("etk,ekn->etn", np.asarray(x), np.asarray(params["w"].dequantize()))
    np.testing.assert_allclose(mapped(params, x), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="`kernel` 'plain w' cannot run w: its weight is vmapped"):
        jax.vmap(quantized(fn, kernel="plain w", **ON))(params, x)


def scanned(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["w"]), None), x, p)[0]


def test_a_scan_over_layers_and_checkpoints_run_the_kernel_inside():
    params, x = {"w": quantize(normal(3, 8, 8), qjax.int4(), (1,), (0,))}, normal(2, 8, seed=1)
    both(scanned, params, x)
    both(lambda p, x: jax.checkpoint(scanned)(p, x), params, x)


def test_a_program_for_another_platform_gets_xla_there():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(8, 4), qjax.int4(), (0,))}, normal(2, 8)
    traced = jax.jit(quantized(fn, **ON)).trace(params, x)
    assert "reduce_precision" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "reduce_precision" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    forced = jax.jit(quantized(fn, kernel="plain w", **ON)).trace(params, x)
    with pytest.raises(NotImplementedError, match="tpu"):
        forced.lower(lowering_platforms=("tpu",))
    on_tpu = jax.jit(quantized(fn, kernels=KERNELS, device=Device("tpu", "v6e"))).trace(params, x)
    assert "reduce_precision" in on_tpu.lower(lowering_platforms=("tpu",)).as_text()
    assert "reduce_precision" not in on_tpu.lower(lowering_platforms=("cpu",)).as_text()


def test_an_export_holds_the_kernel_for_its_platform():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(8, 4), qjax.int4(), (0,))}, normal(2, 8)
    leaves, tree = jax.tree.flatten(params)

    def flat(leaves, x):
        return quantized(fn, **ON)(jax.tree.unflatten(tree, leaves), x)

    exported = jax.export.export(jax.jit(flat), platforms=("cpu", "tpu"))(leaves, x)
    assert "reduce_precision" in exported.mlir_module()
    want = np.asarray(x) @ np.asarray(params["w"].dequantize())
    np.testing.assert_allclose(exported.call(leaves, x), want, rtol=2e-5, atol=2e-5)


def test_the_choice_is_made_once_when_the_program_is_traced():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(8, 4), qjax.int4(), (0,))}, normal(2, 8)
    asked = []
    spy = Kernel("spy", "cpu", lambda r: asked.append(r) or "", run)
    step = jax.jit(quantized(fn, kernels=(spy,), device=HERE))
    step(params, x)
    first = len(asked)
    for _ in range(3):
        step(params, x)
    assert first == len(asked)


def test_sharded_weights_give_the_same_numbers():
    def fn(p, x):
        return x @ p["w"]

    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": quantize(normal(16, 8), qjax.int4(), (0,))}, normal(2, 16)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    placed = jax.tree.map(lambda a: jax.device_put(a, rows), params)
    got = jax.jit(quantized(fn, **ON))(placed, x)
    np.testing.assert_allclose(got, np.asarray(x) @ np.asarray(params["w"].dequantize()), rtol=2e-5, atol=2e-5)


def test_inside_a_shard_map_the_kernel_runs():
    def fn(p, x):
        return x @ p["w"]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    params, x = {"w": quantize(normal(16, 8), qjax.int4(), (0,))}, normal(4, 16)
    call = jax.jit(jax.shard_map(quantized(fn, **ON), mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data")))
    assert "reduce_precision" in call.lower(params, x).as_text()
    np.testing.assert_allclose(call(params, x), np.asarray(x) @ np.asarray(params["w"].dequantize()), rtol=2e-5, atol=2e-5)


def test_no_kernel_is_needed_for_a_tree_without_packed_leaves():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": normal(8, 4)}, normal(2, 8)
    assert not any(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(params, is_leaf=lambda a: isinstance(a, QTensor)))
    text = jax.jit(quantized(fn, **ON)).lower(params, x).as_text()
    assert len(re.findall("dot_general", text)) == 1


# Layouts.


def pack_columns(weight, codes):
    return {"w": codes.codes.swapaxes(-1, -2), "s": codes.scale, "z": codes.zero_point, "t": codes.levels}


def unpack_columns(weight, k, laid):
    return Codes(laid["w"].swapaxes(-1, -2), laid["s"], laid["z"], laid["t"])


def rows_of_columns(weight, k, laid, indices):
    group = k if weight.group_size is None else weight.group_size
    codes = jnp.moveaxis(laid["w"][:, indices], 0, -1).astype(jnp.float32)
    codes = laid["t"][codes.astype(jnp.int32)] if laid["t"] is not None else codes
    if laid["z"] is not None:
        codes = codes - jnp.repeat(laid["z"][indices].astype(jnp.float32), group, axis=-1)
    return codes * jnp.repeat(laid["s"][indices], group, axis=-1)


COLUMNS = Layout("columns", pack_columns, unpack_columns, rows_of_columns)


def run_columns(request, operands, act):
    assert operands.codes is None
    codes = unpack_columns(request.weight, request.k, operands.laid)
    stored = codes.codes if request.weight.bits == 8 else pack(codes.codes, request.weight.bits)
    return run(request, Operands(operands.x, stored, codes.scale, codes.zero_point, operands.levels), act)


LAID = Kernel("columns w", "cpu", why_not, run_columns, COLUMNS)
ON_COLUMNS = {"kernels": (LAID,), "device": HERE}


def is_laid(q):
    return q.form is not None and q.codes.size == 0 and q.scale.size == 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_layout_holds_every_format_and_gives_it_back(spec):
    def fn(p, x):
        return x @ p["w"]

    q, x = quantize(normal(24, 10), spec, (0,)), normal(3, 24, seed=1)
    laid = qjax.prepack(fn, **ON_COLUMNS)({"w": q}, x)
    if spec == qjax.learned(3, per="tensor"):  # which has no scale
        assert laid["w"].form is not None
    else:
        assert is_laid(laid["w"])
    np.testing.assert_array_equal(laid["w"].dequantize(), q.dequantize())
    plain = laid["w"].plain()
    assert plain.form is None and np.array_equal(plain.codes, q.codes) and plain.shape == laid["w"].shape == q.shape
    both(fn, laid, x, **ON_COLUMNS)


def test_only_what_is_laid_out_goes_to_a_kernel_with_a_layout_unless_it_is_forced():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": quantize(normal(16, 6), qjax.int4(), (0,))}, normal(3, 16)
    assert "reduce_precision" not in jax.jit(quantized(fn, **ON_COLUMNS)).lower(params, x).as_text()
    both(fn, params, x, kernel="columns w", **ON_COLUMNS)
    laid = qjax.prepack(fn, **ON_COLUMNS)(params, x)
    with pytest.raises(ValueError, match="`kernel` 'plain w' cannot run w: the weight is laid out for columns"):
        quantized(fn, kernel="plain w", **ON)(laid, x)
    want = np.asarray(x) @ np.asarray(params["w"].dequantize())
    np.testing.assert_allclose(jax.jit(quantized(fn, **ON))(laid, x), want, rtol=2e-5, atol=2e-5)


def test_scans_experts_tied_tables_and_gradients_of_what_is_laid_out():
    layers, x = {"w": quantize(normal(3, 8, 8), qjax.int4(), (1,), (0,))}, normal(2, 8, seed=1)
    laid = qjax.prepack(scanned, **ON_COLUMNS)(layers, x)
    assert is_laid(laid["w"]) and laid["w"].laid["w"].shape == (3, 8, 8)
    both(scanned, laid, x, **ON_COLUMNS)

    def experts(p, x):
        return jnp.einsum("etk,ekn->etn", x, p["w"])

    parts, x = {"w": quantize(normal(3, 8, 5), qjax.int4(), (1,), (0,))}, normal(3, 2, 8)
    laid = qjax.prepack(experts, **ON_COLUMNS)(parts, x)
    both(experts, laid, x, **ON_COLUMNS)
    got = jax.jit(jax.grad(lambda x: jnp.sum(quantized(experts, **ON_COLUMNS)(laid, x) ** 2)))(x)
    w = np.asarray(parts["w"].dequantize())
    np.testing.assert_allclose(got, 2 * np.asarray(x) @ w @ w.swapaxes(1, 2), rtol=1e-4, atol=1e-4)

    def tied(p, tokens):
        return jnp.take(p["e"], tokens, axis=0) @ p["e"].T

    table, tokens = {"e": quantize(normal(12, 8), qjax.uint4(group_size=4), (1,))}, jnp.asarray([[3, 0, 11]])
    laid = qjax.prepack(tied, **ON_COLUMNS)(table, tokens)
    assert is_laid(laid["e"])
    both(tied, laid, tokens, **ON_COLUMNS)
    no_rows = dataclasses.replace(LAID, layout=dataclasses.replace(COLUMNS, rows=None))
    assert qjax.prepack(tied, kernels=(no_rows,), device=HERE)(table, tokens)["e"] is table["e"]


def test_old_codes_are_freed_and_what_is_laid_out_is_saved_as_it_came(tmp_path):
    def fn(p, x):
        return x @ p["w"]

    q = quantize(normal(16, 6), qjax.int4(group_size=8), (0,))
    codes, nbytes = np.asarray(q.codes), q.nbytes
    laid = qjax.prepack(fn, donate=True, **ON_COLUMNS)({"w": q}, normal(3, 16))
    assert q.codes.is_deleted() and laid["w"].nbytes == nbytes + codes.size  # this layout has 8 bits a code
    qjax.save(tmp_path / "checkpoint", laid)
    np.testing.assert_array_equal(qjax.load(tmp_path / "checkpoint").params["w"].codes, codes)


def test_what_would_be_read_in_several_ways_keeps_its_codes():
    def fn(p, x):
        return x @ p["w"] + jnp.sum(p["w"])

    params = {"w": quantize(normal(16, 6), qjax.int4(), (0,))}
    assert qjax.prepack(fn, **ON_COLUMNS)(params, normal(3, 16))["w"] is params["w"]
    assert qjax.prepack(lambda p, x: x @ p["w"], **ON)(params, normal(3, 16))["w"] is params["w"]
