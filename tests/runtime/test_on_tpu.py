"""The TPU kernels through `qjax.prepack` and `qjax.quantized`, interpreted on a CPU: layouts, operands and results are the right ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from qjax_kernels.request import Device

import qjax
from qjax.core import OnlineRotation, quantize
from qjax.runtime import on_tpu, runtime_of
from qjax.runtime.select import kernel_of
from tests.program.cases import normal


def here(chip, name):
    """The kernel of that name as one for this machine, which takes what it takes on the chip; interpreted, it needs no TPU."""
    (kernel,) = (kernel for kernel in on_tpu.kernels() if kernel.name == name)

    def there(request):
        return dataclasses.replace(request, device=Device("tpu", chip))

    return dataclasses.replace(
        kernel, platform="cpu", why_not=lambda r: kernel.why_not(there(r)), run=lambda r, o, a: kernel.run(there(r), o, a)
    )


def through(fn, w, *inputs, chip, name):
    """The result of fn with the packed weight, forced through the kernel."""
    how = {"kernels": (here(chip, name),), "device": Device("cpu", "plain")}
    params = {"w": w}
    with pltpu.force_tpu_interpret_mode():
        laid = qjax.prepack(fn, **how)(params, *inputs)
        assert "tpu kernels" in repr(laid["w"].form)
        return jax.jit(qjax.quantized(fn, kernel=name, **how))(laid, *inputs)


def product(p, x):
    return x @ p["w"]


@pytest.mark.parametrize(
    ("spec", "chip", "name"),
    [
        (qjax.int4(group_size=128), "v6e", "tpu weight-only"),
        (qjax.int8(), "v5e", "tpu weight-only"),
        (qjax.int8(), "v6e", "tpu int8"),
        (qjax.int4(group_size=128), "v5e", "tpu int8"),
        (qjax.fp8_e4m3(), "tpu7x", "tpu fp8"),
    ],
    ids=str,
)
def test_products(spec, chip, name):
    x, w = normal(5, 256, seed=1), quantize(normal(256, 136), spec, (0,))
    act = {"tpu int8": qjax.dynamic(qjax.int8()), "tpu fp8": qjax.dynamic(qjax.fp8_e4m3())}.get(name)
    w = dataclasses.replace(w, act=act)
    y = through(product, w, x, chip=chip, name=name)
    # XLA on the same codes, rows rounded by the same rule: sums are taken in another order, and a code may be one off.
    want = np.asarray(qjax.quantized(product, kernel="xla")({"w": w}, x), np.float64)
    assert np.linalg.norm(y - want) <= (1e-6 if act is None else 1e-3) * np.linalg.norm(want)


def test_experts_that_share_a_list_of_rows_and_experts_with_rows_of_their_own():
    w = quantize(normal(3, 256, 136), qjax.int4(group_size=128), (1,), (0,))
    dense = np.float64(w.dequantize())
    x, sizes = normal(20, 256, seed=1), jnp.int32([5, 0, 12])
    y = through(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes), w, x, sizes, chip="v6e", name="tpu experts")
    want = np.concatenate([np.float64(x[:5]) @ dense[0], np.float64(x[5:17]) @ dense[2], np.zeros((3, 136))])
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)

    own = normal(3, 7, 256, seed=2)
    y = through(lambda p, x: jnp.einsum("etk,ekn->etn", x, p["w"]), w, own, chip="v6e", name="tpu experts")
    np.testing.assert_allclose(y, np.float64(own) @ dense, rtol=1e-5, atol=1e-4)


def rotated(k, spec):
    """A weight behind an on-line rotation, whose rows are rounded to int8."""
    return dataclasses.replace(quantize(normal(k, 136), spec, (0,)), act=qjax.dynamic(qjax.int8()), rotation=OnlineRotation(3))


def test_rows_are_rotated_and_rounded_in_one_pass():
    w, x = rotated(256, qjax.int4(group_size=128)), normal(2, 3, 256, seed=1)
    how = {"kernels": (here("v6e", "tpu rotated int8"), here("v6e", "tpu int8")), "device": Device("cpu", "plain")}
    run, plain = qjax.quantized(product, **how), qjax.quantized(product, kernel="xla")
    laid = qjax.prepack(product, **how)({"w": w}, x[0])

    def loss(fn, p, x):
        y = lax.scan(lambda carry, row: (carry, jax.vmap(fn, (None, 0))(p, row[None])[0]), 0, x)[1]
        return (y**2).sum(), y

    with pltpu.force_tpu_interpret_mode():
        text = str(jax.make_jaxpr(run)(laid, x[0]))
        (_, y), dx = jax.jit(jax.value_and_grad(functools.partial(loss, run, laid), has_aux=True))(x)
    assert "name=rotate_and_quantize" in text and "name=codes_product" in text and "rounded_product" not in text
    (_, want), dwant = jax.jit(jax.value_and_grad(functools.partial(loss, plain, {"w": w}), has_aux=True))(x)
    # XLA rotates in float32 and rounds by the same rule: codes differ where a number of steps is a half but for the rounding of its sums.
    for ours, theirs in ((y, want), (dx, dwant)):
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("k", "chip", "change", "name", "reason"),
    [
        (256, "v6e", {}, "tpu rotated int8", ""),
        (384, "v6e", {}, "tpu int8", "tpu rotated int8: blocks of 384: the size must be a power of two"),
        (256, "tpu7x", {}, "xla int8", "tpu rotated int8: tpu7x has no integer matrix unit"),
        (256, "v6e", {"rotation": None}, "tpu int8", ""),
        (256, "v6e", {"perm": np.arange(256)[None]}, "tpu int8", ""),
    ],
)
def test_the_report_names_what_rotates(k, chip, change, name, reason):
    w = dataclasses.replace(rotated(k, qjax.int8()), **change)
    (site,) = qjax.trace(product, {"w": normal(k, 136)}, normal(5, k)).sites
    found, _, reasons = kernel_of(site, w.spec, w.act, w, runtime_of(device=Device("tpu", chip)))
    assert found == name and ("; ".join(reasons).startswith(reason) if reason else not reasons), reasons
