"""What `qjax quantize` is told on the command line, as a spec and a method; and what does not go together."""

from __future__ import annotations

from typing import Any

import click

_INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]
_CASTS = ["bf16", "fp16"]
# Specs of fixed blocks, and those that take a group.
FIXED = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4"]
TABLES = ["nf4", "nf4_quantile", "fp4"]
LEARNED = ["learned2", "learned3", "learned4"]
_ANY_PER = [*_INTEGERS, *LEARNED, "ternary", "binary", "fp8_e4m3", "fp8_e5m2"]
WEIGHTS = [*_INTEGERS, "ternary", "binary", *TABLES, "fp8_e4m3", "fp8_e5m2", *FIXED, *LEARNED, *_CASTS]
METHODS = ["rtn", "gptq", "gptaq", "autoround", "awq", "hqq", "kmeans", "smoothquant", "llm_int8"]
_SWEEPS = ("gptq", "gptaq")
NO_DATA = ("rtn", "hqq")


def check_options(options: dict[str, Any]) -> None:
    """Refuses options that contradict each other, before anything is read."""
    weight = options["weight"]
    method = options["method"]
    for names, fits, what in (
        (("act_order", "static_groups", "group_aware", "refine", "damping"), method in _SWEEPS, "--method gptq or gptaq"),
        (("steps",), method == "autoround", "--method autoround"),
        (("calibration",), needs_data(options), "a --method other than rtn and hqq, or --activation static"),
        (("observer",), options["activation"] == "static", "--activation static"),
        (("mse",), method in ("rtn", "autoround", *_SWEEPS), "--method rtn, gptq, gptaq or autoround"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if options[name] not in (None, False)]
        if given and not fits:
            is_there = f"the method is {method}" if names != ("observer",) else f"--activation is {options['activation'] or 'float'}"
            raise click.UsageError(f"{given[0]} goes with {what}, and {is_there}")
    if method == "smoothquant" and options["activation"] is None:
        raise click.UsageError("--method smoothquant is for quantized activations: give --activation static or dynamic")
    if method == "llm_int8" and weight not in _INTEGERS:
        raise click.UsageError(f"--method llm_int8 goes with integers such as --weight int8, and the weight is {weight}")
    if method == "hqq" and not weight.startswith("u"):
        raise click.UsageError(f"--method hqq chooses zero points: give --weight uint2 .. uint8, the weight is {weight}")
    if method == "kmeans" and weight not in LEARNED:
        raise click.UsageError(f"--method kmeans fits a table of levels: give --weight learned2 .. learned4, the weight is {weight}")
    if method in _SWEEPS and weight in LEARNED:
        raise click.UsageError(f"--method {method} needs levels that are known before, those of {weight} are learned: give --method kmeans")
    if method == "autoround" and weight not in _INTEGERS:
        instead = "leave --method out" if weight in _CASTS else f"take --method {'kmeans' if weight in LEARNED else 'gptq'}"
        raise click.UsageError(f"--method autoround tunes integers such as --weight int4, and the weight is {weight}: {instead}")
    if options["act_order"] and options["group_aware"]:
        raise click.UsageError("--act-order and --group-aware exclude each other: give one")
    if method == "llm_int8" and options["activation"] == "static":
        raise click.UsageError("--method llm_int8 finds a range for every row anew: leave --activation static out")
    if options["activation"] is not None and weight not in _INTEGERS:
        raise click.UsageError(f"--activation {options['activation']} goes with integers, and the weight is {weight}")
    if options["per"] is not None and weight not in _ANY_PER:
        fits = ", ".join(("integers", *_ANY_PER[len(_INTEGERS) :]))
        raise click.UsageError(f"--per goes with {fits}, and the weight is {weight}: leave it out")
    if options["group_size"] is not None and weight in FIXED:
        raise click.UsageError(f"--group-size has no meaning for {weight}, whose blocks are fixed: leave it out")
    if options["double_quant"] and weight not in (*TABLES, "binary"):
        raise click.UsageError(f"--double-quant goes with {', '.join((*TABLES, 'binary'))}, and the weight is {weight}")
    if options["per"] is not None and options["group_size"] is not None:
        raise click.UsageError(f"--per {options['per']} and --group-size {options['group_size']} exclude each other: give one")
    if weight in _CASTS:
        for name in ("group_size", "pad", "mse"):
            if options[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} has no meaning for the cast {weight}: leave it out")
        if method != "rtn":
            raise click.UsageError(f"--method {method} has nothing to choose for the cast {weight}: leave it out")
    if options["keep"] and options["keep_none"]:
        raise click.UsageError(f"--keep {options['keep'][0]} and --keep-none exclude each other: give one")


def needs_data(options: dict[str, Any]) -> bool:
    """Whether what was asked for needs calibration text."""
    return options["method"] not in NO_DATA or options["activation"] == "static"


def spec_of(options: dict[str, Any]) -> Any:
    """What weights become."""
    import qjax

    names = ("per", "group_size", "pad", "double_quant")
    weight, spec_options = options["weight"], {name: options[name] for name in names if options[name]}
    if options["method"] == "hqq":
        spec_options["zero_dtype"] = "float16"
    if weight == "nf4_quantile":
        return qjax.nf4(table="quantile", **spec_options)
    if weight in LEARNED:
        return qjax.learned(int(weight[-1]), **spec_options)
    if weight.startswith("mxfp") and "_" in weight:
        kind, element = weight.split("_")
        return getattr(qjax, kind)(element, **spec_options)
    return getattr(qjax, weight)(**spec_options)


def method_of(options: dict[str, Any]) -> Any:
    """How; None for a cast, which has nothing to choose."""
    import qjax

    if options["weight"] in _CASTS:
        return None
    given = {name: options[name] for name in ("mse", "damping") if options[name] is not None}
    sweep = {name: options[name] for name in ("act_order", "static_groups", "group_aware", "refine") if options[name]} | given
    ways = {
        "rtn": lambda: qjax.rtn(**given),
        "gptq": lambda: qjax.gptq(**sweep),
        "gptaq": lambda: qjax.gptaq(**sweep),
        "autoround": lambda: qjax.autoround(**given, **({} if options["steps"] is None else {"steps": options["steps"]})),
        "awq": qjax.awq,
        "hqq": qjax.hqq,
        "kmeans": qjax.kmeans,
        "smoothquant": lambda: qjax.smoothquant("search"),
        "llm_int8": qjax.llm_int8,
    }
    return ways[options["method"]]()
