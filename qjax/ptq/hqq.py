"""HQQ: zero points by half-quadratic splitting, from the weight alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core import (
    IntSpec,
    LearnedSpec,
    PerBlock,
    PerGroup,
    QTensor,
    block_decode,
    block_encode,
    block_params,
    divide,
    group_length,
    quantize,
)
from qjax.core.affine import round_stored
from qjax.core.specs import check_count, is_number
from qjax.ptq.method import Outcome, Problem
from qjax.ptq.parts import check_not_cast
from qjax.ptq.work import Work


@dataclasses.dataclass(frozen=True)
class Splitting:
    """Chooses the zero points of blocks; the `ranges` of `qjax.core.quantize`.

    Attributes:
      lp_norm, beta, kappa, iterations: the arguments of `hqq`.
      columns: how many contracted values there are: those beyond are padding, and have no say. None: no padding.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    columns: int | None = None

    def __call__(self, x: jax.Array, spec: Any) -> tuple[jax.Array, jax.Array]:
        """Scale and the best zero point of each block (..., group), both (..., 1)."""
        scale, start = block_params(x, spec)
        zeros, errors = trajectory(x, scale, start, spec, self)
        at = jnp.argmin(errors, axis=0, keepdims=True)  # the first of equals: the start where nothing is better
        return scale, jnp.take_along_axis(zeros, at, axis=0)[0]


def trajectory(x: jax.Array, scale: jax.Array, start: Any, spec: IntSpec, options: Splitting) -> tuple[jax.Array, jax.Array]:
    """The zero points of every step, and the mean |x - x_hat| of each block with each of them.

    Args:
      x: (..., group), floating.
      scale: float32 (..., 1).
      start: zero points (..., 1) to begin with.
      spec: asymmetric integers.
      options: a `Splitting`.

    Returns:
      (zero points, errors), both (iterations + 1, ..., 1), the start first.

    >>> from qjax.core import uint2
    >>> x = jnp.float32([[-1.0, 0.2, 0.2, 2.0]])
    >>> zeros, errors = trajectory(x, jnp.ones((1, 1)), jnp.ones((1, 1)), uint2(zero_dtype="float32"), Splitting(iterations=2))
    >>> [round(z, 2) for z in zeros[:, 0, 0].tolist()], [round(e, 2) for e in errors[:, 0, 0].tolist()]
    ([1.0, 0.92, 0.9], [0.1, 0.1, 0.1])
    """
    x = x.astype(jnp.float32)
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True, where=_real(x, spec, options.columns))

    def step(zero: jax.Array, beta: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        codes = block_encode(x, scale, zero, spec)
        error = x - block_decode(codes, scale, zero, spec)
        target = divide(x - _shrink(error, beta, options.lp_norm), scale)
        return _storable(mean(codes.astype(jnp.float32) - target), spec), (zero, mean(jnp.abs(error)))

    betas = options.beta * options.kappa ** jnp.arange(options.iterations + 1, dtype=jnp.float32)
    return lax.scan(step, start, betas)[1]


def _real(x: jax.Array, spec: IntSpec, columns: int | None) -> Any:
    """Where blocks (..., G, group) hold weights, not padding."""
    if columns is None or not isinstance(spec.granularity, (PerGroup, PerBlock)):
        return True
    size = group_length(columns, spec)
    place = jnp.arange(x.shape[-2])[:, None] * size + (jnp.arange(x.shape[-1]) % size)[None, :]
    return jnp.broadcast_to(place < columns, x.shape)


def _storable(zero: jax.Array, spec: IntSpec) -> jax.Array:
    if spec.float_zero:
        return round_stored(zero, spec.zero_dtype)
    return jnp.clip(jnp.round(zero), spec.qmin, spec.qmax).astype(jnp.int32)


def _shrink(error: jax.Array, beta: jax.Array, p: float) -> jax.Array:
    """The proximal operator of |e|^p, generalised soft thresholding: sign(e) max(0, |e| - |e|^(p - 1) / beta)."""
    size = jnp.abs(error)
    if p == 1:
        return jnp.sign(error) * jnp.maximum(size - 1.0 / beta, 0.0)
    return jnp.sign(error) * jnp.maximum(size - jnp.exp((p - 1) * jnp.log(size)) / beta, 0.0)


@dataclasses.dataclass(frozen=True)
class HQQ:
    """See `hqq`."""

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    observer: None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        changed = [f for f in dataclasses.fields(self) if f.init and getattr(self, f.name) != f.default]
        return f"hqq({', '.join(f'{f.name}={getattr(self, f.name):g}' for f in changed)})" if changed else "hqq"

    def shapes(self, problem: Problem) -> QTensor:
        _checked(problem)
        return jax.eval_shape(lambda w: self.quantize(problem._replace(w=w)).q, problem.w)

    def quantize(self, problem: Problem, state: Any = None) -> Outcome:
        del state
        spec = _checked(problem)
        w, axes, stacked = problem.w, problem.axes, problem.stacked
        columns = math.prod(w.shape[a] for a in axes)
        splitting = Splitting(self.lp_norm, self.beta, self.kappa, self.iterations, columns if spec.pad else None)
        return Outcome(quantize(w, spec, axes, stacked, name=problem.name, ranges=splitting))

    def work(self, problem: Problem) -> Work:
        return Work(steps=math.prod(problem.w.shape) * (self.iterations + 2))


def hqq(lp_norm: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20) -> HQQ:
    """HQQ: chooses the zero point z of each group so that most errors are small and a few may be large; needs no data.

    argmin_z |w - s (round(w / s + z) - z)|_p^p  with p < 1, by half-quadratic splitting: e is what is left after shrinking
    the error, z the mean of what it explains,

        e <- shrink_p(w - s (q - z), beta),  z <- mean(q - (w - e) / s),  beta <- kappa beta.

    The zero point with the least mean |w - w_hat| is kept for each group, the start among them: a group is never worse than
    rounded in that measure.

    Args:
      lp_norm: p, in 0 .. 1.
      beta: what the shrinking begins with, in units of 1 / weight^(2 - p).
      kappa: its growth in each step.
      iterations: steps.

    Returns:
      A method for `qjax.Rule` with an asymmetric `weight`: `qjax.uint4(group_size=64, zero_dtype="float16")` has the floating
      zero points of the publication; with integer ones z is rounded in every step. Symmetric specs, tables and casts are refused.

    Raises:
      ValueError: an option out of range.

    Example:
      >>> import qjax
      >>> qjax.Rule("*", weight=qjax.uint3(group_size=64, zero_dtype="bfloat16"), method=hqq())
      Rule('*', weight=uint3(group_size=64, zero_dtype="bfloat16"), method=HQQ(lp_norm=0.7, beta=10.0, kappa=1.01, iterations=20))

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and the authors' hqq 0.2.8,
    `optimize_weights_proximal_legacy`. There one mean error of the whole weight stops all groups at once, and the zero points
    kept are those of its last step; the range of a group need not hold 0 (it does where a group has values of both signs); scales
    are not rounded before codes are chosen; `round_zero` rounds the zero points to begin with only; and kappa, which the publication and
    earlier releases have, is 1.
    """
    if not (is_number(lp_norm) and 0 < lp_norm <= 1):
        raise ValueError(f"`lp_norm` must be a positive number up to 1, got {lp_norm!r}")
    for argument, value in (("beta", beta), ("kappa", kappa)):
        if not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"`{argument}` must be a positive number, got {value!r}")
    check_count("iterations", iterations, 1)
    return HQQ(lp_norm, beta, kappa, iterations)


def _checked(problem: Problem) -> IntSpec:
    spec, name = problem.spec, problem.name
    check_not_cast(problem, "hqq")
    if isinstance(spec, IntSpec) and not spec.symmetric:
        return spec
    what = "has no zero point to choose" if isinstance(spec, IntSpec) else "has no zero points"
    bits = spec.bits if 2 <= spec.bits <= 8 else 4
    raise ValueError(
        f'`method` hqq chooses zero points, and {spec}, the spec of {name!r}, {what}: give qjax.uint{bits}(..., zero_dtype="float16") '
        f"or another asymmetric spec, or take {'qjax.kmeans()' if isinstance(spec, LearnedSpec) else 'qjax.rtn(mse=True) or qjax.gptq()'}"
    )
