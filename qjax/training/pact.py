"""PACT: activations behind a ReLU are clipped at a learned level."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration import minmax
from qjax.core import ActSpec, IntSpec, Spec, affine_decode, affine_encode, divide
from qjax.core.affine import round_scale
from qjax.core.specs import check_flag, check_number
from qjax.training.estimator import Learned, Moment, at_bits, check_estimators
from qjax.training.straight_through import StraightThrough


def clipped_round(x: jax.Array, alpha: jax.Array, spec: Any) -> jax.Array:
    """Clips to 0 .. alpha and rounds to q_max steps.

    y = clip(x, 0, alpha),  x_q = round(y q_max / alpha) alpha / q_max
    dx_q/dx = 1 where 0 <= x < alpha, else 0;  dx_q/dalpha = 1 where x >= alpha, else 0

    Args:
      x: float32, any shape.
      alpha: float32, broadcasts against `x`.
      spec: an unsigned `IntSpec`, or one `at_bits`.

    Returns:
      float32, the shape of `x`.

    Example:
      >>> import qjax
      >>> clipped_round(jnp.float32([-1.0, 0.4, 9.0]), jnp.float32([3.0]), qjax.uint2()).tolist()
      [0.0, 0.0, 3.0]

    Source: PACT (Choi et al. 2018, arXiv 1805.06085), eq. 1 to 3.
    """

    @jax.custom_jvp
    def run(x: jax.Array, alpha: jax.Array, scale: jax.Array, codes: jax.Array) -> jax.Array:
        del x, alpha
        return affine_decode(codes, scale, None)

    @run.defjvp
    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, alpha = primals[:2]
        t_x, t_alpha = tangents[:2]
        t = jnp.where((x >= 0) & (x < alpha), t_x, 0.0) + jnp.where(x >= alpha, t_alpha, 0.0)
        return run(*primals), t

    scale = _scale(jax.lax.stop_gradient(alpha), spec)
    zero_point = None if spec.symmetric else jnp.zeros(scale.shape, jnp.int32)
    return run(x, alpha, scale, affine_encode(jax.lax.stop_gradient(x), scale, zero_point, spec).astype(jnp.float32))


def _scale(alpha: jax.Array, spec: Any) -> jax.Array:
    scale = round_scale(divide(jnp.maximum(alpha, 0.0), spec.qmax), spec.scale_dtype)
    return jnp.maximum(scale, float(jnp.finfo(jnp.float32).tiny))


@dataclasses.dataclass(frozen=True)
class Clipped:
    """See `pact`."""

    alpha: float | None = None
    learns: bool = True

    def __post_init__(self) -> None:
        check_flag("learns", self.learns)
        if self.alpha is not None:
            check_number("alpha", self.alpha, positive=True)
            object.__setattr__(self, "alpha", float(self.alpha))

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        if not any(act.static for act in activations):
            raise ValueError(f"`train` {self!r} is for static activations: give `activation`, such as qjax.static(qjax.uint4())")
        check_estimators(StraightThrough(), self, weight, activations)

    @property
    def name(self) -> str:
        return "pact"

    @property
    def only_trains(self) -> str:
        return "the level at which it clips is learned" if self.learns else "it clips at a level that is set"

    @property
    def random(self) -> bool:
        return False

    def refusal_of_activation(self, act: ActSpec) -> str:
        if not isinstance(act.spec, IntSpec) or act.spec.signed:
            return f"pact clips at 0, for activations without a sign, got {act}: take qjax.static(qjax.uint4()), or qjax.lsq()"
        return ""

    def observer(self, act: ActSpec) -> Any:
        return act.observer or minmax()

    def from_data(self, state: Any, act: ActSpec) -> Learned:
        hi = jnp.max(self.observer(act).range(state, act.spec)[1])
        return {"alpha" if self.learns else "hi": hi if self.alpha is None else jnp.full_like(hi, self.alpha)}

    def fake_activation(self, x: jax.Array, act: ActSpec, learned: Learned, moment: Moment, features: int) -> jax.Array:
        del features
        alpha = learned["alpha"] if self.learns else jax.lax.stop_gradient(learned["hi"])
        now = at_bits(act.spec, moment)  # pyright: ignore[reportArgumentType]
        return clipped_round(x.astype(jnp.float32), alpha.reshape((1,) * x.ndim), now).astype(x.dtype)

    def params(self, learned: Learned, act: ActSpec) -> tuple[jax.Array, jax.Array | None]:
        scale = _scale(learned["alpha" if self.learns else "hi"], act.spec)
        return scale, None if act.spec.symmetric else jnp.zeros(scale.shape, jnp.int32)


def pact(alpha: float | None = None, learns: bool = True) -> Clipped:
    """Static unsigned activations whose upper end is a parameter: y = clip(x, 0, alpha), rounded to q_max steps.

    The gradient of alpha is the sum of what was clipped; decay it (`optax.add_decayed_weights`), as the paper does. Weights of the
    same rule train straight-through; see `qjax.qat` for another estimator.

    Args:
      alpha: where it begins; None: at the range that the spec's observer finds.
      learns: with False alpha stays: DoReFa's activations are `pact(1.0, learns=False)`.

    Returns:
      An estimator for `Rule(train=...)`.

    Raises:
      TypeError: `alpha` is no number, or `learns` no bool.
      ValueError: `alpha` is not positive, or infinite. `Rule` refuses signed activations, dynamic ones and none.

    Example:
      >>> import qjax
      >>> rule = qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.uint4()), train=pact())
      >>> rule.train.only_trains
      'the level at which it clips is learned'

    Source: PACT (Choi et al. 2018, arXiv 1805.06085).
    """
    return Clipped(alpha, learns)
