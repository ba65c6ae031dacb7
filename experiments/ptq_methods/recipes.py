"""What is compared: for each width and granularity, every method with the spec it rounds to. No number is computed here."""

import dataclasses
from typing import Any

import qjax

GRANULARITIES: dict[str, dict[str, Any]] = {
    "channel": {},
    "g128": {"group_size": 128},
    "g64": {"group_size": 64},
    "g32": {"group_size": 32},
}
SIGNED = {4: qjax.int4, 3: qjax.int3, 2: qjax.int2}
UNSIGNED = {4: qjax.uint4, 3: qjax.uint3, 2: qjax.uint2}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One cell of the table.

    Attributes:
      bits: of a code.
      size: the granularity, as a column of the table calls it.
      name: the method, as a row of the table calls it.
      spec: what every linear layer becomes.
      method: how.
      rotated: rotate the residual stream and the heads first.
      activation: what becomes of the activations of every linear layer.
      rules: more rules, in front.
    """

    bits: int
    size: str
    name: str
    spec: Any
    method: Any
    rotated: bool = False
    activation: Any = None
    rules: tuple[Any, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.bits} {self.size} {self.name}"

    @property
    def cell(self) -> str:
        return f"{self.bits} {self.size}"


def methods() -> dict[str, Any]:
    """The methods that round to evenly spaced codes, by the name the table gives them."""
    return {
        "rounding": qjax.rtn(),
        "rounding, range search": qjax.rtn(mse=True),
        "AWQ": qjax.awq(),
        "GPTQ as published": qjax.gptq(mse=False),
        "GPTQ": qjax.gptq(),
        "GPTQ act-order": qjax.gptq(act_order=True),
        "GPTQ act-order, static groups": qjax.gptq(act_order=True, static_groups=True),
        "AWQ + GPTQ": qjax.awq(then=qjax.gptq(act_order=True)),
    }


def uniform() -> list[Recipe]:
    """Integers of 4, 3 and 2 bits at four granularities."""
    found = []
    for bits, spec in SIGNED.items():
        for size, how in GRANULARITIES.items():
            found += [Recipe(bits, size, name, spec(scale_dtype="float16", **how), method) for name, method in methods().items()]
    return found


def tables() -> list[Recipe]:
    """Tables and small floats."""
    found = []
    for size in ("g128", "g64", "g32"):
        group = GRANULARITIES[size]["group_size"]
        found.append(Recipe(4, size, "NF4", qjax.nf4(group, scale_dtype="float16"), qjax.rtn()))
        found.append(Recipe(4, size, "FP4", qjax.fp4(group, scale_dtype="float16"), qjax.rtn()))
    return found


def every() -> list[Recipe]:
    """All cells, rounding of each first: the others are compared with it."""
    return [*uniform(), *tables()]
