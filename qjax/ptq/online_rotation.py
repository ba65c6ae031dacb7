"""On-line rotation: a product rotates its own input, and its weight is stored rotated, where no other weight can take the rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibration import CrossMoment, CrossMoments, Moments, Observer, Sample, SampleRows, SecondMoment, columns
from qjax.core import ActSpec, CastSpec, OnlineRotation, QTensor, Spec, canonicalize, transform_factors, uncanonicalize
from qjax.program import Leaf, Site
from qjax.ptq.candidates import Rescaling, activation_of
from qjax.ptq.method import Method, Outcome, Problem
from qjax.ptq.rtn import rtn
from qjax.ptq.sparsity import check_filled
from qjax.ptq.work import Work, work_of


@dataclasses.dataclass(frozen=True)
class Online:
    """See `online_rotation`."""

    then: Method
    rotation: OnlineRotation

    @property
    def name(self) -> str:
        inside = [] if self.then == rtn() else [self.then.name]
        inside += [] if self.rotation.seed == 0 else [f"seed={self.rotation.seed}"]
        return f"online_rotation({', '.join(inside)})" if inside else "online_rotation"

    @property
    def fills_zeros(self) -> bool:
        return True

    @property
    def observer(self) -> Observer[Any] | None:
        return self.then.observer

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        return activation_of(self.then, given, ops)

    def refusal(self, leaf: Leaf) -> str:
        """Says why a parameter's products cannot rotate their inputs; "" if they can."""
        ops = [site.op for site in leaf.sites]
        if "conv_general_dilated" in ops:
            return "the windows of a convolution overlap, so its input has no axis to rotate"
        if set(ops) == {"gather"}:
            return "it is looked up, and a lookup has no input to rotate; rotate its rows with qjax.rewrite and qjax.rotation"
        if any(site.op != "gather" and _in_parts(site, leaf) for site in leaf.sites):
            return "a product contracts a part of its axes only, and the rotation mixes all of them"
        return ""

    def shapes(self, problem: Problem) -> QTensor:
        dtype = problem.w.dtype
        wide = problem._replace(w=jax.ShapeDtypeStruct(problem.w.shape, jnp.float32))  # pyright: ignore[reportArgumentType]
        return self._with_rotation(self.then.shapes(wide), dtype, problem.spec, problem.name)

    def quantize(self, problem: Problem, state: Any) -> Outcome:
        filled = check_filled(problem, self.name)
        rotated = problem._replace(w=_rotated(problem.w, problem.axes, self.rotation))
        outcome = self.then.quantize(rotated, None if state is None else rotate_statistics(state, self.rotation))
        q = self._with_rotation(outcome.q, problem.w.dtype, problem.spec, problem.name)
        return Outcome(q, (*outcome.notes, *filled, *_without_hadamard(math.prod(q.sizes))))

    def work(self, problem: Problem) -> Work:
        return work_of(self.then, problem)

    def _with_rotation(self, q: QTensor, dtype: Any, spec: Spec, name: str) -> QTensor:
        if isinstance(spec, CastSpec):
            raise ValueError(f"`method` online_rotation has nothing to gain for the cast {spec} of {name!r}; leave `method` out")
        if q.adapter_left is not None:
            raise ValueError(f"`then` {self.then.name} of {name!r} adds a low-rank part, which is not rotated: write "
                             "qjax.low_rank(then=qjax.online_rotation(...))")  # fmt: skip
        return dataclasses.replace(q, rotation=self.rotation, dtype=np.dtype(dtype))


def online_rotation(then: Method | None = None, seed: int = 0) -> Online:
    """Rotates the input of a product at run time and stores its weight rotated: outliers of both are spread over all channels.

    x w = (x R) (R^T w),  R = D H / sqrt(K): D random signs, H a Hadamard matrix (`qjax.core.hadamard_transform`: sums and differences,
    K log K operations a row, no matrix is stored), over all K contracted values of the weight, whatever axes they come from.
    For inputs that no other weight can rotate, as those of a down-projection behind a non-linearity; where one can, `qjax.rewrite`
    with `qjax.rotation` costs nothing at run time. Activations of a rule with an `activation` are rounded after they are rotated.

    On a rule that names products of two activations (a colon in its pattern), both operands are rotated along their contracted axes
    before they are rounded, as queries and keys behind a rotary embedding; the product is what it was.

    Args:
      then: the method that chooses the codes of R^T w, on statistics of x R; None rounds to nearest. Of a rule for products: None.
      seed: of the random signs.

    Returns:
      A method for `qjax.Rule`.

    Raises:
      TypeError: `then` is no method.
      ValueError: `then` rescales inputs (write qjax.awq(then=qjax.online_rotation(...)) for both) or asks for statistics that cannot
        be rotated; `seed` is no whole number. `qjax.quantize` refuses convolutions and lookups, naming them.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["down"]
      >>> params = {"down": jax.random.normal(jax.random.key(0), (64, 16))}
      >>> x = jax.random.normal(jax.random.key(1), (32, 64)).at[:, 3].mul(50.0)
      >>> def error(method):
      ...     rule = qjax.Rule("*", weight=qjax.int4(), activation=qjax.dynamic(qjax.int4()), method=method)
      ...     result = qjax.quantize(fn, params, qjax.Policy([rule]), calibration=[x])
      ...     return float(jnp.linalg.norm(jax.jit(qjax.quantized(fn))(result.params, x) - fn(params, x)))
      >>> round(error(online_rotation()) / error(None), 1)
      0.5

    Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456), section 4, stages 1b and 1d, and R3 and R4 of SpinQuant (Liu et al. 2024,
    arXiv 2405.16406). Differences: sizes without a Hadamard matrix take a Kronecker product with a Hartley matrix (both need a list
    of matrices); random signs on line, too, so that no input is one that H gathers in one channel; any weight may have it.
    A pruned weight is not sparse in the rotated basis: its zeros would be lost, so `qjax.quantize` refuses it.
    """
    method = rtn() if then is None else then
    if not isinstance(method, Method) or isinstance(method, type):
        raise TypeError(f"`then` must be a method such as qjax.gptq(), got {then!r}")
    if isinstance(method, (Rescaling, Online)):
        how = "give it once" if isinstance(method, Online) else f"write qjax.{method.name}(then=qjax.online_rotation(...))"
        raise ValueError(f"`then` must be a method that rounds, such as qjax.gptq(), got {method.name}: an input is rescaled first and "
                         f"rotated once; {how}")  # fmt: skip
    if method.observer is not None and not isinstance(method.observer, (SecondMoment, CrossMoment, SampleRows)):
        raise ValueError(f"`then` {method.name} asks for statistics that cannot be rotated ({type(method.observer).__name__}): take one "
                         "that asks for second moments or rows, such as qjax.gptq()")  # fmt: skip
    return Online(method, OnlineRotation(seed))


def rotate_statistics(state: Any, rotation: OnlineRotation) -> Any:
    """What an observer would have seen of x R.

    Args:
      state: of `SecondMoment` (R^T S R), `CrossMoment` or `sample_rows`.
      rotation: R.

    Returns:
      A state of the same kind.

    Raises:
      TypeError: a state of another kind.

    Example:
      >>> state = rotate_statistics(Moments(jnp.diag(jnp.array([4.0, 0.0]))[None], jnp.array([1])), OnlineRotation())
      >>> jnp.abs(state.total).round(4).tolist()
      [[[2.0, 2.0], [2.0, 2.0]]]
    """
    if isinstance(state, Moments):
        return Moments(_apply_both(state.total, rotation), state.count)
    if isinstance(state, CrossMoments):
        return state._replace(total=_apply_both(state.total, rotation), cross=_apply_both(state.cross, rotation))
    if isinstance(state, Sample):
        return state._replace(x=_apply(state.x, rotation))
    raise TypeError(f"`state` must be that of a second moment or of sampled rows to be rotated, got {type(state).__name__}")


_apply = jax.jit(lambda x, rotation: rotation.apply(x), static_argnums=1)


def _apply_both(moment: jax.Array, rotation: OnlineRotation) -> jax.Array:
    """R^T S R of moments (..., K, K)."""
    half = jnp.swapaxes(_apply(moment, rotation), -1, -2)
    return jnp.swapaxes(_apply(half, rotation), -1, -2)


def _rotated(w: jax.Array, axes: tuple[int, ...], rotation: OnlineRotation) -> jax.Array:
    """R^T w along the contracted axes, float32 of the shape of `w`."""
    rows = _apply(canonicalize(jnp.asarray(w).astype(jnp.float32), axes), rotation)
    return uncanonicalize(rows, axes, tuple(w.shape[a] for a in axes))


def _without_hadamard(size: int) -> tuple[str, ...]:
    factors = transform_factors(size)
    if factors.rest == 1:
        return ()
    return (f"no Hadamard matrix of {size} is known here: a factor of {factors.rest} is a Hartley matrix, multiplied out",)


def _in_parts(site: Site, leaf: Leaf) -> bool:
    """Whether a product contracts less than all contracted values of its parameter."""
    return math.prod(atom.size for w, _ in site.pairs for atom in site.view.dims[w]) != columns(site, leaf)
