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
HALF = {"scale_dtype": "float16"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One cell of the table.

    Attributes:
      bits: of a code.
      size: the granularity, as a column of the table calls it.
      name: the method, as a row of the table calls it.
      spec: what every linear layer becomes.
      method: how.
      rotated: rotate the residual stream and the heads first (the embedding's copy for the head is untied for it, and stays float).
      activation: what becomes of the activations of every linear layer.
      products: what becomes of the operands of attention's two products, (scores, values); each (left, right).
      online: methods get an on-line rotation in front: patterns of the layers that do, and whether queries and keys are rotated.
    """

    bits: int
    size: str
    name: str
    spec: Any
    method: Any
    rotated: bool = False
    activation: Any = None
    products: tuple[Any, ...] = ()
    online: bool = False

    @property
    def key(self) -> str:
        return f"{self.bits} {self.size} {self.name}"


def methods() -> dict[str, Any]:
    """The methods that round to evenly spaced codes without a zero point, by the name the table gives them."""
    return {
        "rounding": qjax.rtn(),
        "rounding, range search": qjax.rtn(mse=True),
        "AWQ": qjax.awq(),
        "GPTQ as published": qjax.gptq(mse=False),
        "GPTQ": qjax.gptq(),
        "GPTQ act-order": qjax.gptq(act_order=True),
        "GPTQ act-order, static groups": qjax.gptq(act_order=True, static_groups=True),
        "GPTQ group-aware": qjax.gptq(group_aware=True),
        "GPTQ, refined": qjax.gptq(refine=2),
        "GPTAQ": qjax.gptaq(),
        "GPTAQ of all the error, refined": qjax.gptaq(1.0, refine=2),
        "AutoRound": qjax.autoround(),
        "AWQ + GPTQ": qjax.awq(then=qjax.gptq(act_order=True)),
    }


def uniform() -> list[Recipe]:
    """Integers of 4, 3 and 2 bits at four granularities."""
    found = []
    for bits, spec in SIGNED.items():
        for size, how in GRANULARITIES.items():
            signed, asymmetric = spec(**HALF, **how), UNSIGNED[bits](**HALF, **how)
            zeros = UNSIGNED[bits](**HALF, **how, zero_dtype="float16")
            found += [Recipe(bits, size, name, signed, method) for name, method in methods().items()]
            found.append(Recipe(bits, size, "HQQ", zeros, qjax.hqq()))
            found.append(Recipe(bits, size, "rounding, asymmetric", asymmetric, qjax.rtn()))
            found.append(Recipe(bits, size, "GPTQ act-order, asymmetric", asymmetric, qjax.gptq(act_order=True)))
            found.append(Recipe(bits, size, "rotation + GPTQ act-order", signed, qjax.gptq(act_order=True), rotated=True))
            table = qjax.learned(bits, **({} if size == "channel" else HALF), **how)
            found.append(Recipe(bits, size, "k-means", table, qjax.kmeans()))
    return found


def tables() -> list[Recipe]:
    """Fixed tables and small floats, of 4 bits."""
    found = []
    for size in ("g128", "g64", "g32"):
        group = GRANULARITIES[size]["group_size"]
        found.append(Recipe(4, size, "NF4", qjax.nf4(group, **HALF), qjax.rtn()))
        found.append(Recipe(4, size, "FP4", qjax.fp4(group, **HALF), qjax.rtn()))
    found.append(Recipe(4, "g64", "NF4, double quantized", qjax.nf4(64, double_quant=True), qjax.rtn()))
    for name, spec, size in (("MXFP4", qjax.mxfp4(), "g32"), ("NVFP4", qjax.nvfp4(), "g16")):
        found.append(Recipe(4, size, name, spec, qjax.rtn()))
        found.append(Recipe(4, size, f"{name} + GPTQ", spec, qjax.gptq(act_order=True, static_groups=True)))
    found.append(Recipe(4, "g16", "rounding", qjax.int4(group_size=16, **HALF), qjax.rtn()))
    return found


def repaired() -> list[Recipe]:
    """Two bits with a float correction of low rank beside them."""
    spec, method = qjax.int2(group_size=64, **HALF), qjax.gptq(act_order=True)
    return [
        Recipe(2, "g64", f"GPTQ act-order + {kind} of rank 16", spec, qjax.low_rank(rank=16, kind=kind, then=method))
        for kind in ("eora", "lqer")
    ]


def activations() -> list[Recipe]:
    """Integer activations, and integer keys and values, with and without rotations. W4 per channel by GPTQ."""
    found, spec, method = [], qjax.int4(**HALF), qjax.gptq(act_order=True, static_groups=True)
    int8, int4 = qjax.dynamic(qjax.int8()), qjax.dynamic(qjax.int4())
    kv4 = ((int8, int4), (int8, int4))
    for name, activation, products in (("W4A8", int8, ()), ("W4A4", int4, ()), ("W4A4 KV4", int4, kv4)):
        for rotated, online, how in ((False, False, ""), (True, False, ", rotated"), (True, True, ", rotated, on-line too")):
            found.append(Recipe(4, "activations", name + how, spec, method, rotated, activation, products, online))
    return found


def every() -> list[Recipe]:
    """All cells, rounding of each first: the others are compared with it."""
    return [*uniform(), *tables(), *repaired(), *activations()]
