"""Frozen dataclasses to JSON and back by their type hints: no pickle, no `eval`, nothing is imported by name.

A class that stands in a union (a spec, a granularity, a method) is written with its kind, `{"kind": "int", ...}`, and
`KINDS` is the whole list of what a file may name. Every other class is written as its plain entries. An entry that is
missing takes the default of its field, so a field with a default may be added without a new layout; an entry or a kind
that is not known is refused, never ignored.
"""

import dataclasses
import functools
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from qjax import ptq
from qjax.calibration import AbsMax, Entropy, MinMax, MovingAverage, Mse, Percentile
from qjax.core import (
    CastSpec,
    CodebookSpec,
    FloatSpec,
    IntSpec,
    LearnedSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    RangeFinder,
)
from qjax.policy import Method, Trains
from qjax.ptq.autoround import AutoRound
from qjax.ptq.awq import AWQ
from qjax.ptq.gptq import GPTQ
from qjax.ptq.hqq import HQQ
from qjax.ptq.kmeans import KMeans
from qjax.ptq.llm_int8 import LLMInt8
from qjax.ptq.low_rank import LowRank
from qjax.ptq.online_rotation import Online
from qjax.ptq.rtn import RoundToNearest
from qjax.ptq.smoothquant import SmoothQuant
from qjax.training import QAT, Clipped, DoReFa, LearnedStep, Lora, StraightThrough
from qjax.training.estimator import ActivationEstimator, WeightEstimator


@dataclasses.dataclass(frozen=True)
class OtherMethod:
    """A method that the layout has no kind for: its name and how it printed. It says what was done; it cannot run."""

    name: str
    text: str
    observer: None = dataclasses.field(default=None, init=False)

    def quantize(self, problem: Any, state: Any) -> Any:
        raise ValueError(
            f"`method` {self.text} was loaded from a checkpoint, which keeps only its name: build it again"
        )


# The names are part of the layout: they stay when a class is renamed.
KINDS: dict[str, type] = {
    "tensor": PerTensor,
    "channel": PerChannel,
    "token": PerToken,
    "group": PerGroup,
    "block": PerBlock,
    "int": IntSpec,
    "codebook": CodebookSpec,
    "float": FloatSpec,
    "cast": CastSpec,
    "learned": LearnedSpec,
    "rtn": RoundToNearest,
    "gptq": GPTQ,
    "hqq": HQQ,
    "kmeans": KMeans,
    "low_rank": LowRank,
    "smoothquant": SmoothQuant,
    "awq": AWQ,
    "llm_int8": LLMInt8,
    "online_rotation": Online,
    "autoround": AutoRound,
    "other_method": OtherMethod,
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "absmax": AbsMax,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": Mse,
    "qat": QAT,
    "straight_through": StraightThrough,
    "lsq": LearnedStep,
    "pact": Clipped,
    "dorefa": DoReFa,
    "lora": Lora,
}
METHODS = (RoundToNearest, GPTQ, HQQ, KMeans, LowRank, SmoothQuant, AWQ, LLMInt8, Online, AutoRound, OtherMethod)
OBSERVERS = (MinMax, MovingAverage, AbsMax, Percentile, Entropy, Mse)
ESTIMATORS = (StraightThrough, LearnedStep, Clipped, DoReFa)
_PROTOCOLS = {Method: METHODS, ptq.Method: METHODS, RangeFinder: OBSERVERS, Trains: (QAT, Lora, *ESTIMATORS),
              WeightEstimator: ESTIMATORS, ActivationEstimator: ESTIMATORS}  # fmt: skip
_NAMES = {cls: name for name, cls in KINDS.items()}


def encode(value: Any) -> Any:
    """Turns a value into what `json` can write.

    Args:
      value: dataclasses, tuples, lists, dicts with string keys, numbers (infinities and NaN too), strings, None.

    Returns:
      The same as dictionaries, lists and scalars.

    Raises:
      TypeError: a value that has no place in JSON.

    >>> from qjax.core import int4
    >>> encode(int4(group_size=128))["granularity"]
    {'kind': 'group', 'size': 128}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in _NAMES and isinstance(value, Method):
            return encode(OtherMethod(value.name, repr(value)))
        kind = {"kind": _NAMES[type(value)]} if type(value) in _NAMES else {}
        return kind | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: encode(v) for key, v in value.items()}
    if isinstance(value, np.generic):
        return encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Method):
        return encode(OtherMethod(value.name, repr(value)))
    raise TypeError(f"a {type(value).__name__} cannot be stored in a checkpoint's document")


def decode(hint: Any, data: Any, where: str) -> Any:
    """Builds the value that `encode` wrote.

    Args:
      hint: what it must be: a dataclass, a union, `tuple[T, ...]`, `dict[str, T]`, a `Literal`, a scalar type or Any.
      data: what `json` read.
      where: what errors call the place.

    Returns:
      The value.

    Raises:
      ValueError: something does not fit the hint; a kind or entry that this version does not know; a value that the
        class itself refuses.

    >>> decode(PerGroup, {"kind": "group", "size": 0}, "leaves[0].spec.granularity")
    Traceback (most recent call last):
    ValueError: leaves[0].spec.granularity: `group_size` must be at least 1, got 0
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType) or hint in _PROTOCOLS:
        return _decode_union(args or _PROTOCOLS[hint], data, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: decode(args[1], v, f"{where}[{key!r}]") for key, v in data.items()}
    if origin is Literal and any(type(data) is type(a) and data == a for a in args):
        return data
    if hint is float and _not_finite(data):
        return float(data["float"])
    # A whole number may stand where a float is asked for: it was given so.
    if type(data) is hint or (hint is float and type(data) is int) or (hint is type(None) and data is None):
        return data
    raise ValueError(f"{where} must be {_describe(hint)}, the file has {_short(data)}")


def _decode_union(members: tuple[Any, ...], data: Any, where: str) -> Any:
    members = tuple(m for member in members for m in _PROTOCOLS.get(member, (member,)))
    if data is None and type(None) in members:
        return None
    if isinstance(data, dict) and "kind" in data:
        kinds = [_NAMES[m] for m in members if m in _NAMES]
        if data["kind"] not in kinds:
            raise ValueError(f"{where} has the kind {_short(data['kind'])}, which is none of {', '.join(kinds)}: "
                             "a newer qjax may know it")  # fmt: skip
        return _decode_dataclass(KINDS[data["kind"]], data, where)
    rest = [m for m in members if m not in _NAMES and m is not type(None)]
    if isinstance(data, list):  # a pair where one value may stand alone
        rest = [m for m in rest if get_origin(m) is tuple] or rest
    elif isinstance(data, dict) and not _not_finite(data):
        rest = [m for m in rest if dataclasses.is_dataclass(m)] or rest
    given = float if _not_finite(data) else type(data)
    if given in rest or len(rest) == 1:
        return decode(given if given in rest else rest[0], data, where)
    raise ValueError(f"{where} must be {' or '.join(map(_describe, members))}, the file has {_short(data)}")


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    kind = _NAMES.get(cls)
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ValueError(f"{where} must be {_describe(cls)}, the file has {_short(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(data) - set(fields) - {"kind"})
    if unknown:
        raise ValueError(f"{where} has the entries {', '.join(map(repr, unknown))}, which this version does not know: "
                         "a newer qjax may")  # fmt: skip
    missing = [f.name for f in fields.values() if f.name not in data and _required(f)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}")
    hints = _hints(cls)
    values = {name: decode(hints[name], data[name], f"{where}.{name}") for name in fields if name in data}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # what the class itself refuses: a spec of 9 bits
        raise ValueError(f"{where}: {error}") from error


def _not_finite(data: Any) -> bool:
    return isinstance(data, dict) and list(data) == ["float"] and data["float"] in ("nan", "inf", "-inf")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _describe(hint: Any) -> str:
    if hint in _NAMES:
        return f"of kind {_NAMES[hint]!r}"
    if dataclasses.is_dataclass(hint) or get_origin(hint) is dict:
        return "an object"
    if get_origin(hint) is tuple:
        return "a list"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return "null" if hint is type(None) else f"a {hint.__name__}"


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
