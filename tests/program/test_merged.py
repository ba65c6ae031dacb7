"""Products with merged axes: the same numbers, and gradients without an operand that is transposed first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.program import compat
from qjax.program.merged import bind_merged

SHAPES = {
    "btk,kn->btn": ((2, 3, 4), (4, 5)),
    "btk,khd->bthd": ((2, 3, 4), (4, 2, 5)),
    "bthd,hdn->btn": ((2, 3, 2, 4), (2, 4, 5)),
    "bkgtd,bksd->bkgts": ((2, 2, 2, 3, 4), (2, 2, 5, 4)),
    "bkgts,bksd->bkgtd": ((2, 2, 2, 3, 5), (2, 2, 5, 4)),
    "abkc,kn->abcn": ((2, 3, 4, 5), (4, 6)),  # the kept axes stand apart
    "abk,cdk->abcd": ((2, 3, 4), (5, 6, 4)),
    "ab,cd->abcd": ((2, 3), (4, 5)),
    "kn,k->n": ((4, 5), (4,)),
    "nab,nkm->nabkm": ((0, 2, 3), (0, 4, 5)),
}


def products(jaxpr):
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]


def kept(eqn):
    (contract, batch), operands = eqn.params["dimension_numbers"], [v.aval for v in eqn.invars]
    return [v.ndim - len(c) - len(b) for v, c, b in zip(operands, contract, batch, strict=True)]


def both(formula, bind):
    """An einsum's one product, and the same with `bind`."""
    shapes = SHAPES[formula]
    values = [np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(shapes)]
    closed = jax.make_jaxpr(lambda x, y: jnp.einsum(formula, x, y))(*values)
    (eqn,) = [e for part in [closed.jaxpr, *(compat.parts(p)[0] for e in closed.jaxpr.eqns for _, p in compat.subprograms(e))]
              for e in products(part)]  # fmt: skip
    operands = [np.random.default_rng(i).normal(size=v.aval.shape).astype(np.float32) for i, v in enumerate(eqn.invars)]
    return (lambda x, y: bind(eqn, [x, y])[0]), operands


@pytest.mark.parametrize("formula", SHAPES)
def test_products_and_their_gradients_are_the_same(formula):
    merged, operands = both(formula, bind_merged)
    plain, _ = both(formula, compat.bind)
    made, back = jax.vjp(merged, *map(jnp.asarray, operands))
    wanted, wanted_back = jax.vjp(plain, *map(jnp.asarray, operands))
    np.testing.assert_allclose(made, wanted, rtol=1e-6, atol=1e-6)
    slope = jnp.cos(jnp.arange(wanted.size, dtype=jnp.float32)).reshape(wanted.shape)
    for a, b in zip(back(slope), wanted_back(slope), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formula", ["btk,kn->btn", "bthd,hdn->btn", "bkgtd,bksd->bkgts"])
def test_gradients_sum_over_one_axis(formula):
    """A gradient that sums over two axes has its operand written out transposed on CPUs."""
    merged, operands = both(formula, bind_merged)
    jaxpr = jax.make_jaxpr(lambda x, y, g: jax.vjp(merged, x, y)[1](g))(*operands, merged(*operands))
    eqns = products(jaxpr.jaxpr)
    assert len(eqns) == 3 and max(kept(eqns[0])) == 1  # the product, then its two gradients
    assert min(len(eqn.params["dimension_numbers"][0][0]) for eqn in eqns[1:]) == 1
    assert max(len(eqn.params["dimension_numbers"][0][0]) for eqn in eqns) == (2 if formula == "bthd,hdn->btn" else 1)  # its h and d
