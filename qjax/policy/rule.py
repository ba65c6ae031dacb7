"""Rule: which parameters, products or caches it is for, and what they become."""

from __future__ import annotations

import dataclasses
import fnmatch
import types
from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

from qjax.core import FLOAT8, ActSpec, CacheSpec, IntSpec, OnlineRotation, PerGroup, Spec
from qjax.core.products import describe_pair


@runtime_checkable
class Method(Protocol):
    """What a rule's `method` must be: see `qjax.ptq` for the interface that the methods implement."""

    @property
    def name(self) -> str: ...

    @property
    def observer(self) -> Any: ...

    def quantize(self, problem: Any, state: Any) -> Any: ...


@runtime_checkable
class ChoosesActivation(Protocol):
    """A method that decides what becomes of the activations, too."""

    def activation(self, given: ActSpec | None, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        """Returns the spec, given the rule's and the primitives of the parameter's sites, and a remark or ""; None leaves them float.

        Raises:
          ValueError: it does not go with the one given.
        """
        ...


@runtime_checkable
class RotatesInputs(Protocol):
    """A method that rotates what a product reads, `qjax.online_rotation()`: the one kind that a rule for products may have."""

    @property
    def rotation(self) -> OnlineRotation: ...

    @property
    def then(self) -> Any: ...


@runtime_checkable
class Trains(Protocol):
    """How a rule's numbers train: an estimator such as `qjax.lsq()`, or `qjax.qat(...)`; see `qjax.training`."""

    @property
    def only_trains(self) -> str:
        """Why rounding after training cannot stand for it ("its scales are learned"); "" if it can."""
        ...

    def check(self, weight: Spec | None, activations: tuple[ActSpec, ...]) -> None:
        """Refuses specs that it cannot train.

        Raises:
          ValueError: naming the spec and what to write.
        """
        ...


@runtime_checkable
class TrainsBeside(Protocol):
    """What a rule trains in place of its parameters, `qjax.lora()`: they may stay float."""

    @property
    def beside(self) -> bool: ...


def _is_plain_float8(spec: Any) -> bool:
    """Whether codes are FP8 with one float scale for a row or the tensor."""
    return spec.element in FLOAT8 and spec.scale_dtype not in ("e8m0", "e4m3") and not isinstance(spec.granularity, PerGroup)


@runtime_checkable
class SaysWhen(Protocol):
    """What `qjax.schedule(...)` gives: a part of how a rule trains, and no estimator."""

    @property
    def ends(self) -> int: ...

    def bits_at(self, step: Any, activation: bool = False) -> Any: ...


def _meant(given: Any, argument: str = "") -> str:
    """What may have been meant by a value that an argument does not take; "" where that cannot be told."""
    if isinstance(given, Spec) and argument in ("activation", "cache"):
        return f"; write qjax.{'dynamic' if argument == 'activation' else 'kv_cache'}(...) around it"
    if isinstance(given, types.FunctionType) and given.__module__.startswith("qjax."):
        return f"; it is not called: write qjax.{given.__name__}(...)"
    if callable(given):
        return "; give what it returns, not itself"
    if isinstance(given, SaysWhen):
        return "; a schedule is a part of how a rule trains: write train=qjax.qat(schedule=qjax.schedule(...))"
    kinds = ((Spec, "a spec", "weight"), (ActSpec, "an activation spec", "activation"), (CacheSpec, "a cache spec", "cache"),
             (Method, "a method", "method"), (Trains, "how a rule trains", "train"))  # fmt: skip
    return next((f"; {what} goes to `{name}`" for kind, what, name in kinds if isinstance(given, kind)), "")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the parameters whose path matches a pattern are quantized; or products of activations (a colon in the pattern); or caches.

    Args:
      pattern: a glob over parameter paths; `*` crosses `/`. A leading `params/` and a trailing `/value` are not part of a path.
        With a colon it is a glob over the names of products of two activations, `scope:dot_general.i`, which
        `qjax.trace(fn, params, x).products` lists, and it never matches a parameter (whose path, if it has a colon, is matched by
        `?` in its place). Other rules never match products.
      weight: what the weights become, or None to leave them float.
      method: how they get there; None rounds to nearest. Of products of two activations: None, or `qjax.online_rotation()`, which
        rotates both operands before they are rounded.
      activation: what becomes of the activations that meet the weights, `qjax.dynamic(...)` or `qjax.static(...)`: with it the
        product runs on integers, or on FP8. None leaves them float. Of a product of two activations it is what both of them become, or a
        pair, for the left and the right operand as the program has them (`jnp.einsum` may swap them: print the program). A scale
        is shared along the contracted axis; where that is time (the values of a causal model), a dynamic range sees what comes
        later and moves what comes before by rounding steps. A static one does not.
      cache: what the caches whose path matches become, `qjax.kv_cache(...)`. Such a rule never matches a parameter or a product, and
        the others never match a cache. It counts where the cache is packed, in `qjax.quantized_cache`, which says what a path is.
      train: how weights and activations train in `qjax.fake_quant`: an estimator such as `qjax.lsq()`, or `qjax.qat(...)` for one of
        each and a schedule. None is the straight-through estimator. `qjax.quantize` refuses a rule whose ranges are learned. Or
        `qjax.lora(...)`: adapters, which `qjax.qlora` trains beside the frozen parameters, packed or (without a `weight`) float.

    Raises:
      TypeError: an argument of the wrong kind.
      ValueError: a product rule with a `weight`, or with a `method` that is no rotation; a cache rule with anything else.

    Example:
      >>> import qjax
      >>> Rule("*mlp*", weight=qjax.int4(group_size=128))
      Rule('*mlp*', weight=int4(group_size=128))
      >>> Rule("*attn:dot_general.1", activation=(qjax.static(qjax.uint8()), qjax.static(qjax.int8())))
      Rule('*attn:dot_general.1', activation=static(uint8(per="tensor")) x static(int8(per="tensor")))
      >>> Rule("*/key", cache=qjax.kv_cache(qjax.uint4(), per="channel"))
      Rule('*/key', cache=kv_cache(uint4(), per="channel", window=32))
    """

    pattern: str
    weight: Spec | None = None
    method: Method | None = None
    activation: ActSpec | tuple[ActSpec, ActSpec] | None = None
    cache: CacheSpec | None = None
    train: Trains | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TypeError(f"`pattern` must be a non-empty string such as '*mlp*', got {self.pattern!r}")
        if self.cache is not None:
            self._check_cache()
            return
        if self.is_product:
            self._check_product()
            self._check_train(self.operands or ())
            return
        if self.weight is not None and not isinstance(self.weight, Spec):
            raise TypeError(f"`weight` must be a spec such as qjax.int4(group_size=128) or None, got {self.weight!r}{_meant(self.weight)}")
        if self.method is not None and (not isinstance(self.method, Method) or isinstance(self.method, type)):
            raise TypeError(f"`method` must be a method such as qjax.gptq(), got {self.method!r}{_meant(self.method)}")
        if self.weight is None and self.method is not None:
            raise TypeError(f"`method` {self.method.name} has nothing to do in rule {self.pattern!r}: give it a `weight` spec")

        if self.activation is not None and not isinstance(self.activation, ActSpec):
            raise TypeError(f"`activation` must be qjax.dynamic(...), qjax.static(...) or None, got {self.activation!r}"
                            f"{_meant(self.activation, 'activation')}")  # fmt: skip
        activation = self.activation_of()[0]
        if activation is not None and not isinstance(self.weight, IntSpec) and not (activation.is_float and self.weight is not None):
            what = f"`activation` {activation} of rule {self.pattern!r}"
            raise TypeError(f"{what} needs a `weight` spec of integers such as qjax.int8(), got {self.weight}")
        self._check_train(() if activation is None else (activation,))

    def _check_train(self, activations: tuple[ActSpec, ...]) -> None:
        if self.train is None:
            return
        if not isinstance(self.train, Trains) or isinstance(self.train, type):
            raise TypeError(f"`train` must be an estimator such as qjax.lsq(), or qjax.qat(...), got {self.train!r}{_meant(self.train)}")
        if self.weight is None and not activations and not isinstance(self.train, TrainsBeside):
            raise TypeError(f"`train` {self.train!r} has nothing to do in rule {self.pattern!r}: it leaves everything float")
        self.train.check(self.weight, activations)

    def _check_cache(self) -> None:
        if not isinstance(self.cache, CacheSpec):
            raise TypeError(f"`cache` must be qjax.kv_cache(...) or None, got {self.cache!r}{_meant(self.cache, 'cache')}")
        for name in ("weight", "method", "activation", "train"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` must be None in rule {self.pattern!r}, which names caches, got {getattr(self, name)!r}: "
                                 "write a rule for each")  # fmt: skip

    def _check_product(self) -> None:
        what = f"rule {self.pattern!r} names products of two activations (it has a colon)"
        if self.weight is not None:
            raise ValueError(f"`weight` must be None, got {self.weight!r}: {what}; give it an `activation` only")
        if self.method is not None and (not isinstance(self.method, RotatesInputs) or self.method.then.name != "rtn"):
            raise ValueError(f"`method` must be None or qjax.online_rotation(), got {self.method!r}: {what}, which are rounded to nearest")
        pair = self.activation if isinstance(self.activation, tuple) else (self.activation,)
        if self.activation is not None and (len(pair) > 2 or not all(isinstance(act, ActSpec) for act in pair)):
            raise TypeError(
                f"`activation` must be qjax.dynamic(...), qjax.static(...), a pair of them or None, got {self.activation!r}: {what}"
            )
        floats = [act for act in pair if act is not None and act.is_float]
        if floats and not (len(floats) == len(pair) and all(_is_plain_float8(act.spec) for act in floats)):
            raise ValueError(f"`activation` {self.activation}: {what}, and those multiply integers, or FP8 with a float scale for a row or "
                             "the tensor on both sides; give qjax.dynamic(qjax.int8()) or qjax.dynamic(qjax.fp8_e4m3())")  # fmt: skip

    @property
    def is_product(self) -> bool:
        """Whether the rule is for products of two activations."""
        return ":" in self.pattern and not self.is_cache

    @property
    def is_cache(self) -> bool:
        """Whether the rule is for caches."""
        return self.cache is not None

    @property
    def operands(self) -> tuple[ActSpec, ActSpec] | None:
        """What the left and the right operand of a product become; None leaves them float."""
        act = self.activation
        return act if act is None or isinstance(act, tuple) else (act, act)

    def activation_of(self, ops: Collection[str] = ()) -> tuple[ActSpec | None, str]:
        """What becomes of activations that meet the weight in these primitives, and a remark: what the method makes of `activation`."""
        given = None if isinstance(self.activation, tuple) else self.activation  # a pair is for a product
        if self.method is None:  # asked of every site, and to ask a protocol is slow
            return given, ""
        return self.method.activation(given, ops) if isinstance(self.method, ChoosesActivation) else (given, "")

    def matches(self, path: str) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern)

    def __repr__(self) -> str:
        if self.is_cache:
            return f"Rule({self.pattern!r}, cache={self.cache})"
        weight = "" if self.is_product else f", weight={self.weight}"
        method = f", method={self.method!r}" if self.method is not None else ""
        act = describe_pair(self.activation) if isinstance(self.activation, tuple) else self.activation
        activation = f", activation={act}" if act is not None else ""
        train = f", train={self.train!r}" if self.train is not None else ""
        return f"Rule({self.pattern!r}{weight}{method}{activation}{train})"
