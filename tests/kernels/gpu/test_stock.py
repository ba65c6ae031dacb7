"""What GPUs without kernels of ours run: XLA formulations, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qjax_kernels.gpu import stock
from qjax_kernels.request import Device, Request, Weight


@pytest.mark.parametrize(("m", "bits"), [(1, 4), (20, 4), (20, 8)])
def test_products_of_few_and_many_rows(m, bits, monkeypatch):
    monkeypatch.setattr(stock, "BLOCK_BYTES", 4 * 128 * 512)  # two blocks
    draw = np.random.default_rng(0)
    n, k, top = 256, 512, 2 ** (bits - 1)
    codes, scales = draw.integers(-top, top, (n, k)), draw.uniform(0.01, 0.1, (n, k // 128))
    x = jnp.asarray(draw.normal(size=(m, k)), jnp.float32)
    given = jnp.asarray(codes, jnp.int4 if bits == 4 else jnp.int8), jnp.pad(jnp.asarray(scales, jnp.float32), ((0, 0), (0, 3)))
    y = jax.jit(lambda x: stock.grouped_matmul(x, *given, group_size=128))(x)
    np.testing.assert_allclose(y, np.float64(x) @ (codes * np.repeat(scales, 128, 1)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "m", "n", "named"),
    [
        (Weight("int", 4, 128), 16, 4096, ""),
        (Weight("int", 4, None), 16, 4096, "by itself"),
        (Weight("int", 3, 128), 16, 4096, "int3"),
        (Weight("int", 4, 128), 16, 256, "fits into the cache"),
        (Weight("int", 4, 128), 64, 4100, "multiple of 128"),
    ],
)
def test_why_not_names_the_obstacle(weight, m, n, named):
    reason = stock.why_not(Request(Device("cuda", "sm_80", 108), m, n, 4096, weight))
    assert named in reason and bool(named) == bool(reason)
