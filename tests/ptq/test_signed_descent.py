"""Rounding tuned by signed gradients: the update against a transcription of the paper, and that what is tuned is what is packed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.ptq.block_tuning import _blocked, _codes, pack_rounded
from qjax.ptq.method import Problem
from qjax.ptq.signed_descent import Descent, Offsets, decode, descend, round_with, start
from tests.ptq.layers import SPECS, numbers


class Paper:
    """Algorithm 1 of arXiv 2309.05516 in float64 for y = x w, blocks along the rows of w^T: (N, G, group)."""

    def __init__(self, x, w, spec):
        self.x, self.w, self.spec = np.float64(x), np.float64(w), spec

    def round(self, v, alpha, beta):
        w, spec = self.w, self.spec
        if spec.symmetric:
            scale = alpha * np.abs(w).max(-1, keepdims=True) / (spec.qmax + (0.5 if spec.scale_rule == "half" else 0))
            smooth_zero = zero = np.zeros_like(scale)
        else:
            lo, hi = beta * np.minimum(w.min(-1, keepdims=True), 0), alpha * np.maximum(w.max(-1, keepdims=True), 0)
            scale = (hi - lo) / (spec.qmax - spec.qmin)
            smooth_zero = spec.qmin - lo / scale
            zero = np.clip(np.round(smooth_zero), spec.qmin, spec.qmax)
        free = np.round(w / scale + v) + zero
        codes = np.clip(free, spec.qmin, spec.qmax)
        return codes, scale, zero, (free >= spec.qmin) & (free <= spec.qmax)

    def loss_and_signs(self, v, alpha, beta):
        spec, (codes, scale, zero, inside) = self.spec, self.round(v, alpha, beta)
        delta = ((codes - zero) * scale - self.w).reshape(len(self.w), -1)
        loss = np.square(self.x @ delta.T).sum()
        slope = (2 * delta @ (self.x.T @ self.x)).reshape(self.w.shape)
        # w_hat = s (q - z): dq/dV = 1, dq/ds = -w / s^2 where nothing is clipped; there dz cancels, where it is clipped it does not.
        d_v = slope * scale * inside
        d_scale = (slope * ((codes - zero) - self.w / scale * inside)).sum(-1, keepdims=True)
        if spec.symmetric:
            reach = np.abs(self.w).max(-1, keepdims=True) / (spec.qmax + (0.5 if spec.scale_rule == "half" else 0))
            return loss, (np.sign(d_v), np.sign(d_scale * reach), np.zeros_like(scale))
        d_zero = (-slope * scale * ~inside).sum(-1, keepdims=True)
        steps = spec.qmax - spec.qmin
        hi, lo = np.maximum(self.w.max(-1, keepdims=True), 0), np.minimum(self.w.min(-1, keepdims=True), 0)
        d_scale = d_scale + d_zero * beta * lo / scale**2  # z = qmin - lo / s
        return loss, (np.sign(d_v), np.sign(d_scale * hi / steps), np.sign(d_scale * -lo / steps - d_zero * lo / scale))

    def run(self, steps, lr):
        at = [np.zeros_like(self.w), np.ones((*self.w.shape[:-1], 1)), np.ones((*self.w.shape[:-1], 1))]
        tried = [(self.loss_and_signs(*at)[0], [a.copy() for a in at])]
        for t in range(steps):
            signs = self.loss_and_signs(*at)[1]
            at = [a - lr * (1 - t / steps) * s for a, s in zip(at, signs, strict=True)]
            at = [np.clip(at[0], -0.5, 0.5), np.clip(at[1], 1 / 16, 1), np.clip(at[2], 1 / 16, 1)]
            tried.append((self.loss_and_signs(*at)[0], [a.copy() for a in at]))
        return min(tried, key=lambda pair: pair[0])


@pytest.mark.parametrize("spec", [qjax.int3(group_size=4, scale_rule="full"), qjax.uint2(group_size=4)], ids=str)
def test_the_update_is_the_papers(spec):
    x, w = numbers(32, 8), numbers(3, 2, 4, seed=1)

    def loss(offsets, t=None):
        delta = (decode(round_with(w, offsets, spec)) - w).reshape(3, 8)
        return jnp.sum(jnp.square(x @ delta.T))

    begin = start(w, spec, False)
    found = jax.jit(lambda o: descend(loss, loss, o, o, Descent(12, 0.05, True, False, 12)))(begin)
    least, (v, alpha, beta) = Paper(x, w, spec).run(12, 0.05)
    np.testing.assert_allclose(found.least, least, rtol=1e-5)
    assert least < 0.8 * float(found.rounding)
    np.testing.assert_allclose(found.best.v, v, atol=1e-5)
    np.testing.assert_allclose(found.best.top, alpha, atol=1e-5)
    if not spec.symmetric:
        np.testing.assert_allclose(found.best.bottom, beta, atol=1e-5)


def test_it_finds_the_best_of_a_problem_of_one_dimension():
    """Every input is the same number, so only the sum of the errors counts, and rounding to nearest makes them all of one sign."""
    spec, w = qjax.int4(scale_rule="full"), jnp.float32([[0.45, 0.3, -1.7, 7.0]])

    def loss(offsets, t=None):
        return jnp.square(jnp.sum(decode(round_with(w, offsets, spec)) - w))

    begin = start(w, spec, False)
    found = descend(loss, loss, begin, begin, Descent(50, 0.02, False, False, 50))
    corners = itertools.product(*([np.floor(v), np.ceil(v)] for v in np.asarray(w[0])))
    best = min(float(np.square(np.sum(np.asarray(c) - np.asarray(w[0])))) for c in corners)
    np.testing.assert_allclose([found.least, found.rounding], [best, 1.05**2], rtol=1e-3)
    assert np.asarray(jnp.abs(found.best.v) <= 0.5).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_tuned_is_what_is_packed(spec):
    w = numbers(20, 6, dtype=jnp.bfloat16).at[3].set(0)
    problem = Problem(w, spec, (-2,), (), 1, "w")

    @jax.jit
    def both(w, key):
        x, canonical, logical = _blocked(problem, w, None)
        keys = jax.random.split(key, 3)
        shapes = x.shape, (*x.shape[:-1], 1), (*x.shape[:-1], 1)
        draw = [jax.random.uniform(k, s, minval=lo, maxval=hi)
                for k, s, (lo, hi) in zip(keys, shapes, [(-0.5, 0.5), (0.3, 1), (0.3, 1)], strict=True)]  # fmt: skip
        offsets = Offsets(*draw)._replace(v=jnp.where(draw[0] > 0.4, 0.5, draw[0]))
        return logical(decode(round_with(x, offsets, spec))).astype(w.dtype), _codes(x, offsets, spec, canonical)

    fake, codes = both(w, jax.random.key(0))
    q = pack_rounded(problem, codes, None)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), np.asarray(fake))
    assert spec.float_zero or not np.asarray(q.dequantize()[3]).any()
    assert float(jnp.linalg.norm((q.dequantize() - w).astype(jnp.float32))) > 0
