"""DoReFa: weights of few bits on an even grid over -1 .. 1, behind a hyperbolic tangent."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, IntSpec, PerChannel, PerTensor, QTensor, Spec, affine_decode, assemble, canonicalize, divide, uncanonicalize
from qjax.core.layout import stacked_positions
from qjax.core.rounding import checked
from qjax.ptq.method import Problem
from qjax.training.estimator import Learned, Moment, at_bits, check_estimators, with_gradient
from qjax.training.straight_through import StraightThrough


@dataclasses.dataclass(frozen=True)
class DoReFa:
    """See `dorefa`."""

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        if weight is None:
            raise ValueError("`train` dorefa() is for weights; for activations alone write qjax.pact(1.0, learns=False)")
        check_estimators(self, StraightThrough(), weight, activations)

    @property
    def name(self) -> str:
        return "dorefa"

    @property
    def only_trains(self) -> str:
        return "its weights are those behind a tangent"

    @property
    def random(self) -> bool:
        return False

    @property
    def learns(self) -> bool:
        return False

    def refusal(self, spec: Spec) -> str:
        fits = isinstance(spec, IntSpec) and not spec.signed and spec.zero_dtype == spec.scale_dtype == "float32"
        if not (fits and isinstance(spec, IntSpec) and isinstance(spec.granularity, PerTensor | PerChannel)):
            return (f'dorefa has an even number of levels and one range, got {spec}: take qjax.uint2(zero_dtype="float32"); '
                    "one bit is qjax.binary() with qjax.ste()")  # fmt: skip
        return ""

    def init(self, problem: Problem) -> Learned:
        del problem
        return {}

    def fake(self, problem: Problem, learned: Learned, moment: Moment) -> jax.Array:
        del learned
        spec: IntSpec = problem.spec  # pyright: ignore[reportAssignmentType]
        w, axes, stacked = checked(problem.w, spec, problem.axes, problem.stacked, problem.name)
        most = jnp.float32(at_bits(spec, moment).qmax)
        bounded = _bounded(w, axes, stacked)
        codes = jnp.round((jax.lax.stop_gradient(bounded) * 0.5 + 0.5) * most)
        value = affine_decode(codes, 2.0 / most, most * 0.5)
        rounded = with_gradient(bounded, value, jnp.ones(value.shape, bool))
        return uncanonicalize(rounded, axes, [w.shape[a] for a in axes]).astype(w.dtype)

    def pack(self, problem: Problem, learned: Learned) -> QTensor:
        del learned
        spec: IntSpec = problem.spec  # pyright: ignore[reportAssignmentType]
        w, axes, stacked = checked(problem.w, spec, problem.axes, problem.stacked, problem.name)
        most = jnp.float32(spec.qmax)
        codes = jnp.round((_bounded(w, axes, stacked) * 0.5 + 0.5) * most).astype(jnp.int32)
        one = jnp.ones((1,) * codes.ndim, jnp.float32)
        sizes = [w.shape[a] for a in axes]
        return assemble(codes, one * (2.0 / most), one * (most * 0.5), spec, axes, sizes, w.dtype, stacked=stacked, name=problem.name)


def _bounded(w: jax.Array, axes: tuple[int, ...], stacked: tuple[int, ...]) -> jax.Array:
    """tanh(w) / max |tanh(w)| of each independent array, (kept..., K) float32; zeros where all is zero."""
    bent = jnp.tanh(canonicalize(w, axes).astype(jnp.float32))
    own = stacked_positions(axes, stacked, w.ndim)
    reach = jnp.max(jnp.abs(bent), axis=tuple(i for i in range(bent.ndim) if i not in own), keepdims=True)
    return divide(bent, jnp.where(reach > 0, reach, 1.0))


def dorefa() -> DoReFa:
    """DoReFa's weights: w_q = 2 round(n (t / 2 + 1/2)) / n - 1 with t = tanh(w) / max |tanh(w)| and n = 2^bits - 1.

    The gradient of the rounding is 1; those of the tangent and of the largest magnitude are as they are. Weights lie in -1 .. 1
    whatever their size was: what follows must scale (a norm), and the model should train with it from the start.

    Returns:
      An estimator for the weights of `Rule(train=...)`, whose spec has a floating zero point: `qjax.uint2(zero_dtype="float32")`. A static
      activation of the rule keeps its range; DoReFa's own is `qjax.qat(dorefa(), qjax.pact(1.0, learns=False))`.

    Raises:
      ValueError: from `Rule`, for another spec.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> rule = qjax.Rule("*", weight=qjax.uint2(zero_dtype="float32"), train=dorefa())
      >>> fq = qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([rule]))
      >>> [round(v, 3) for v in fq({"w": jnp.array([[3.0], [0.1], [-0.5]])}, jnp.eye(3)).ravel().tolist()]
      [1.0, 0.333, -0.333]

    Source: DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160), eq. 9, and the authors' `get_dorefa`, through whose maximum the gradient flows.
    For one bit the paper has sign(w) mean |w|: `qjax.binary(per="channel")`.
    """
    return DoReFa()
