"""Kernels as values, and the choice among them by stated facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import jax
from qjax_kernels.request import CacheRead, Device, Request, Weight

from qjax.core import ActSpec
from qjax.runtime.request import Operands
from qjax.runtime.tuning import key_of

_OTHER = {  # what some kernels take, in words
    "int8 codes": "not one symmetric scale a row, found as they come",
    "int8 + outliers": "int8 beside columns of outliers",
}
XLA = "xla"  # the name of what needs no kernel, and of what forces it


class Codes(NamedTuple):
    """A weight without a layout: codes int8 or uint8 (..., N, K); float32 scales (..., N, G), G = 1 where a row shares one; zero points
    int32 like the scales, or None; levels float32 (2^bits,), the table of a codebook, or None."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    levels: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the weights of some kernels are laid out, which is done once, by `qjax.prepack`.

    Attributes:
      name: what `repr` and reasons call it.
      pack: of the weight's format and (P, N, K) or (N, K) codes, any pytree of arrays; it is vmapped over stacked weights.
      unpack: its inverse, of the format, K and the arrays; the levels may be left out.
      rows: of the format, K, the arrays and int32 indices (...): rows (..., K) in float32, of which only those are read. None where a
        table that is looked up in should keep its own layout.
    """

    name: str
    pack: Callable[[Weight, Codes], Any]
    unpack: Callable[[Weight, int, Any], Codes]
    rows: Callable[[Weight, int, Any, jax.Array], jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to run a product of packed weights, for one platform.

    Attributes:
      name: what reports, `qjax.quantized(kernel=...)` and `qjax doctor` call it.
      platform: as `Device.platform`.
      why_not: why it cannot take a request, or is slower for it than what XLA does; "" if it should.
      run: the product y (P, M, N) of `request.dtype`, without P where there is one part or `request.ragged`. The activation spec is for
        kernels that round activations, None for others.
      layout: of the weights that it reads, or None for codes as a `QTensor` has them. Other weights go to other kernels, because laying one
        out costs more than a product with it; where it is forced they are laid out in every call.
      activations: what becomes of activations in it, as `Request.activation` says; it is not asked about others.
      ragged: whether it takes parts that share a list of rows; it is not asked about those if not.
      rotates: whether it rotates rows itself, as `Request.rotation` says; it is asked about nothing else. For other kernels rows are
        rotated in front.
    """

    name: str
    platform: str
    why_not: Callable[[Request], str]
    run: Callable[[Request, Operands, ActSpec | None], jax.Array]
    layout: Layout | None = None
    activations: tuple[str | None, ...] = (None, "int8", "fp8")
    ragged: bool = False
    rotates: bool = False


class Tokens(NamedTuple):
    """Packed tokens of a cache: codes (B, G, T, D * bits / 8), int8, uint8, or bytes of two codes of four bits; float32 scales (B, G, T);
    zero points like the scales, or None."""

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None


class CacheOperands(NamedTuple):
    """What a kernel that reads a cache is given: q (B, H, D), G dividing H, keys, values, and int32 (B,), how many tokens are read."""

    q: jax.Array
    keys: Tokens
    values: Tokens
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class CacheKernel:
    """One way to decode a token with a packed cache, for one platform.

    Attributes:
      name: as `Kernel.name`.
      platform: as `Device.platform`.
      why_not: why it cannot read a cache, or is slower for it than what XLA does; "" if it should.
      run: (o (B, H, D) in the dtype of q, the log-sum-exp of the scores, float32 (B, H); -1e30 where no token is read).
    """

    name: str
    platform: str
    why_not: Callable[[CacheRead], str]
    run: Callable[[CacheRead, CacheOperands], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a request.

    Attributes:
      kernel: None for XLA.
      reasons: (kernel, why not) for those that would have come before it.
    """

    kernel: Kernel | None
    reasons: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What products and reads of caches are chosen from.

    Attributes:
      device: where the program will run.
      kernels: the fastest first.
      force: the name of the only one that may run, "xla" for none, None to choose.
      tuned: which was the fastest when it was measured, by `tuning.key_of` of the product; "xla" for XLA.
      cache_kernels: those that read caches.
      force_cache: as `force`, of these.
    """

    device: Device
    kernels: tuple[Kernel, ...] = ()
    force: str | None = None
    tuned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cache_kernels: tuple[CacheKernel, ...] = ()
    force_cache: str | None = None


def choose(
    request: Request,
    kernels: Sequence[Kernel],
    force: str | None = None,
    laid: Layout | EllipsisType | None = ...,
    where: str = "here",
    tuned: Mapping[str, str] | None = None,
) -> Choice:
    """Chooses the first kernel that takes a request; XLA where none does.

    Args:
      request: the facts.
      kernels: the fastest first.
      force: the name of the only kernel that may run, or "xla".
      laid: the layout that the weight has, None for its own; by default that which the kernel wants.
      where: what an error calls the place.
      tuned: what was measured, as in `Runtime`. A weight that is laid out for a kernel does not go to XLA for it.

    Returns:
      A `Choice`.

    Raises:
      ValueError: `force` is no kernel's name, or that of one that cannot run, with the reason.

    Example:
      >>> from qjax_kernels.request import Device, Weight
      >>> request = Request(Device("cpu", "avx2"), 1, 64, 64, Weight("int", 4))
      >>> kernel = Kernel("narrow", "cpu", lambda r: "" if r.n < 64 else f"{r.n} rows, 63 at most", lambda r, o, a: o.x)
      >>> choose(request, [kernel])
      Choice(kernel=None, reasons=(('narrow', '64 rows, 63 at most'),))
      >>> choose(request, [kernel], force="narrow")
      Traceback (most recent call last):
      ValueError: `kernel` 'narrow' cannot run here: 64 rows, 63 at most
    """
    check_name(force, kernels)
    if force == XLA:
        return Choice(None)
    fastest = (tuned or {}).get(key_of(request)) if tuned and force is None else None
    if fastest == XLA and (laid is None or isinstance(laid, EllipsisType)):
        mine = [kernel.name for kernel in kernels if kernel.platform == request.device.platform]
        return Choice(None, tuple((name, "slower than XLA when `qjax tune` measured it") for name in mine))
    reasons: list[tuple[str, str]] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.name != fastest):
        if force is not None and kernel.name != force:
            continue
        if kernel.platform != request.device.platform:
            reason = f"it is for {kernel.platform}, and the program for {request.device.platform}"
            if force is None:
                continue
        elif request.activation not in kernel.activations:
            own = " or ".join(name or "float" for name in kernel.activations)
            reason = f"it takes {own} activations, and these are {_OTHER.get(request.activation or '', request.activation or 'float')}"
            if force is None and request.activation not in _OTHER:
                continue
        elif kernel.rotates and request.rotation is None:
            reason = "it rotates rows before it rounds them, and these are not to be rotated, or in another order"
            if force is None:
                continue
        elif request.ragged and not kernel.ragged:
            reason = "it takes no experts that share a list of rows"
        else:
            reason = kernel.why_not(request) or _why_not_laid(kernel, laid, force is not None)
        if not reason:
            return Choice(kernel, tuple(reasons))
        if force is not None:
            raise ValueError(f"`kernel` {force!r} cannot run {where}: {reason}")
        reasons.append((kernel.name, reason))
    return Choice(None, tuple(reasons))


def choose_read(read: CacheRead, runtime: Runtime) -> tuple[CacheKernel | None, tuple[tuple[str, str], ...]]:
    """Chooses the first kernel that reads a cache; None for XLA. And (kernel, why not) for those that would have come before.

    Args:
      read: the facts.
      runtime: what to choose from.

    Raises:
      ValueError: `runtime.force_cache` is the name of one that cannot run, with the reason.
    """
    reasons: list[tuple[str, str]] = []
    for kernel in runtime.cache_kernels if runtime.force_cache != XLA else ():
        if runtime.force_cache not in (None, kernel.name) or (runtime.force_cache is None and kernel.platform != read.device.platform):
            continue
        reason = kernel.why_not(read)
        if not reason:
            return kernel, tuple(reasons)
        if runtime.force_cache is not None:
            raise ValueError(f"`kernel` {kernel.name!r} cannot read the cache: {reason}")
        reasons.append((kernel.name, reason))
    return None, tuple(reasons)


def _why_not_laid(kernel: Kernel, laid: Layout | EllipsisType | None, forced: bool) -> str:
    if isinstance(laid, EllipsisType) or laid == kernel.layout or (laid is None and forced):
        return ""
    if laid is None:
        return "the weight is not laid out for it: see qjax.prepack"
    return f"the weight is laid out for {laid.name}"


def check_name(force: str | None, kernels: Sequence[Kernel | CacheKernel]) -> None:
    """Refuses a name that no kernel has, and what are no kernels."""
    if not all(isinstance(one, (Kernel, CacheKernel)) for one in kernels):
        raise TypeError(f"`kernels` must be a sequence of qjax.runtime.Kernel, got {kernels!r}: write kernel= to name one")
    names = [kernel.name for kernel in kernels]
    if force is not None and force != XLA and force not in names:
        known = ", ".join(map(repr, names)) or "none, for none is installed"
        raise ValueError(f"`kernel` must be {XLA!r} or one of {known}, got {force!r}")
