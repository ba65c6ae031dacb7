"""What is observed of a site: its error on the data is exactly the quadratic form of its second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.calibration import Rows, SecondMoment, hessian, init_states, observe_program, why_no_rows
from qjax.core import int8
from qjax.program import trace
from qjax.ptq.parts import matrices, problem_of
from tests.program.cases import CASES, normal

DIMS = ("NHWC", "HWIO", "NHWC")


def conv(**options):
    return lambda p, x: lax.conv_general_dilated(x, p["w"], dimension_numbers=DIMS, **options)


# Functions that are linear in one weight.
LINEAR = {
    "matmul": (lambda p, x: x @ p["w"], normal(7, 5), normal(3, 4, 7)),
    "transposed": (lambda p, x: x @ p["w"].T, normal(5, 7), normal(3, 4, 7)),
    "two axes": (lambda p, x: jnp.einsum("bhd,hdm->bm", x, p["w"]), normal(3, 4, 5), normal(6, 3, 4)),
    "two axes in the other order": (lambda p, x: jnp.einsum("bdh,hdm->bm", x, p["w"]), normal(3, 4, 5), normal(6, 4, 3)),
    "split axis": (lambda p, x: jnp.einsum("bhd,dhm->bm", x, p["w"].reshape(3, 4, 5)), normal(12, 5), normal(6, 4, 3)),
    "batched": (lambda p, x: jnp.einsum("ebk,ekn->ebn", x, p["w"]), normal(3, 7, 5), normal(3, 6, 7)),
    "batched, stored last": (lambda p, x: jnp.einsum("ebk,kne->ebn", x, p["w"]), normal(7, 5, 3), normal(3, 6, 7)),
    "two batch axes": (lambda p, x: jnp.einsum("febk,efkn->ebfn", x, p["w"]), normal(2, 3, 7, 5), normal(3, 2, 6, 7)),
    "ragged": (lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32)), normal(3, 7, 5), normal(6, 7)),
    "conv": (conv(window_strides=(2, 1), padding="SAME"), normal(3, 2, 4, 6), normal(2, 7, 6, 4)),
    "conv dilated": (
        conv(window_strides=(1, 1), padding=((2, 1), (0, 1)), rhs_dilation=(2, 1), lhs_dilation=(1, 2)),
        normal(2, 3, 4, 6),
        normal(2, 7, 6, 4),
    ),
    "conv grouped": (conv(window_strides=(1, 1), padding="VALID", feature_group_count=2), normal(2, 2, 3, 8), normal(2, 5, 5, 6)),
    "depthwise": (conv(window_strides=(1, 1), padding="SAME", feature_group_count=6), normal(3, 3, 1, 12), normal(2, 5, 5, 6)),
    "under scan": (
        lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1],
        normal(3, 7, 5),
        normal(4, 7),
    ),
    "in a branch not taken": (lambda p, x: lax.cond(x.sum() > 1e9, lambda: x @ p["w"], lambda: x[:, :5]), normal(7, 5), normal(4, 7)),
    "in a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, c: c.at[i].set(x[i] @ p["w"]), jnp.zeros((3, 4, 5))),
        normal(7, 5),
        normal(3, 4, 7),
    ),
    "rematerialized": (lambda p, x: jax.checkpoint(lambda w, x: x @ w)(p["w"], x), normal(7, 5), normal(4, 7)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_second_moment_is_the_quadratic_form_of_the_output_error(name):
    fn, w, x = LINEAR[name]
    program = trace(fn, {"w": w}, x)
    (site,) = program.sites
    observers = {site.key: SecondMoment()}
    states = jax.jit(observe_program(program, observers))(init_states(program, observers), [w, x])
    total = states[site.key].total
    delta = normal(*w.shape, seed=11)
    deltas = matrices(problem_of(program.leaves[0], site, int8(), delta))
    total = total.reshape(-1, *total.shape[-2:])
    quadratic = jnp.einsum("snk,skj,snj->", deltas, total, deltas)
    moved = fn({"w": w + delta}, x) - fn({"w": w}, x)
    np.testing.assert_allclose(quadratic, jnp.sum(moved**2), rtol=1e-3)


def test_the_hessian_is_twice_the_mean_outer_product():
    observer, x = SecondMoment(), normal(1, 10, 4)
    state = observer.update(observer.init(1, 4), Rows(x))
    assert state.count.tolist() == [10]
    np.testing.assert_allclose(hessian(state)[0], 2 * x[0].T @ x[0] / 10, rtol=1e-5)
    assert not np.asarray(hessian(observer.init(1, 4))).any()


def test_rows_past_the_last_group_belong_to_no_expert():
    rows = Rows(normal(1, 6, 4), jnp.array([0, 0, 2, 2, 2, -1]), 3)
    state = SecondMoment().update(SecondMoment().init(3, 4), rows)
    assert state.count.tolist() == [2, 0, 3]


def test_what_cannot_be_observed_says_why():
    reasons = {}
    for case in CASES:
        program = trace(case.fn, case.params, *case.inputs)
        reasons |= {(case.name, s.path): why_no_rows(s, program.leaves[s.leaf]) for s in program.sites if s.op == "gather" or s.sharded}
    assert "a lookup has no activations" in reasons["tied_embedding", "embed"]
    assert "split over devices" in reasons["shard_map", "rows"]
