"""`qjax doctor`: which path each format takes on this machine, and what to install for a faster one."""

from typing import Any

import click

from qjax.cli.shared import emit, json_option

CHIPS = {"v5e": "tpu", "v5p": "tpu", "v6e": "tpu", "tpu7x": "tpu", "sm_80": "cuda", "sm_90a": "cuda", "sm_100a": "cuda"}
ROWS = (1, 512)  # decoding a token, reading a prompt


@click.command("doctor")
@click.option("--chip", type=click.Choice([*CHIPS]), help="Say it for a machine with this chip.  [default: this machine]")
@click.option("--size", nargs=2, type=click.IntRange(min=1), default=(4096, 4096), show_default=True, metavar="N K",
              help="Of the weight (N, K) that is asked about.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Of the activations.  [default: float32 on CPUs]")
@json_option
def command(chip: str | None, size: tuple[int, int], dtype: str | None, as_json: bool) -> None:
    """Says which kernel runs each format on this machine, why not a faster one, and what to install for it.

    Nothing is computed: kernels are chosen by what is known of the machine and the product.
    """
    import jax

    from qjax.runtime import Device, device_of, runtime_of
    from qjax.runtime.doctor import advice, cache_path_of, path_of

    here = device_of()
    device = here if chip is None else Device(CHIPS[chip], chip)  # pyright: ignore[reportArgumentType]
    runtime = runtime_of(device=device)
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    paths = [path_of(weight, act, runtime, rows, *size, dtype, *more) for weight, act, *more in _specs() for rows in ROWS]
    document = {
        "jax": jax.__version__,
        "device": {"platform": device.platform, "chip": device.chip, "cores": device.cores},
        "devices": jax.device_count() if chip is None else None,
        "kernels": [kernel.name for kernel in (*runtime.kernels, *runtime.cache_kernels)],
        "advice": list(advice(here)) if chip is None else [],
        "size": list(size),
        "dtype": dtype,
        "paths": [_as_json(path) for path in paths],
        "caches": [_cache_as_json(spec, *cache_path_of(spec, runtime, dtype=dtype)) for spec in _cache_specs()],
    }
    if as_json:
        emit(document)
        return
    click.echo(_text(document, paths))


def _specs() -> list[tuple[Any, ...]]:
    import qjax

    act = qjax.dynamic(qjax.int8())
    weights = [qjax.int8(), qjax.int4(group_size=128), qjax.uint4(group_size=128), qjax.nf4(), qjax.int3(group_size=128)]
    weights += [qjax.int2(group_size=128), qjax.mxfp4(), qjax.nvfp4(), qjax.fp8_e4m3()]
    rounded = [(qjax.int8(), act), (qjax.int8(), act, True)]
    rounded += [(qjax.int4(group_size=128), act), (qjax.fp8_e4m3(), qjax.dynamic(qjax.fp8_e4m3()))]
    return [*((weight, None) for weight in weights), *rounded]


def _cache_specs() -> list[Any]:
    import qjax

    whole = [qjax.kv_cache(qjax.int8()), qjax.kv_cache(qjax.uint4()), qjax.kv_cache(qjax.int4(), rotate=True)]
    return [*whole, qjax.kv_cache(qjax.uint4(), group_size=32), qjax.kv_cache(qjax.uint4(), per="channel")]


def _cache_as_json(spec: Any, kernel: str, reasons: tuple[str, ...]) -> dict[str, Any]:
    return {"spec": str(spec), "kernel": kernel, "reasons": list(reasons)}


def _as_json(path: Any) -> dict[str, Any]:
    reasons = [{"kernel": name, "reason": reason} for name, reason in path.reasons]
    return {"weight": path.weight, "activation": path.activation, "rows": path.rows, "kernel": path.kernel, "reasons": reasons}


def _text(document: dict[str, Any], paths: list[Any]) -> str:
    from rich.table import Table

    from qjax.report import render

    device = document["device"]
    cores = {"cpu": "threads", "cuda": "multiprocessors"}.get(device["platform"], "cores")
    lines = [f"jax {document['jax']}, {device['platform']}, {device['chip']}, {device['cores']} {cores}"]
    count = document["devices"]
    if count is not None and count > 1:
        lines.append(f"{count} devices: weights that are split over several of them run on XLA")
    lines += [f"to do: {text}" for text in document["advice"]]
    names = document["kernels"]
    lines.append(f"kernels: {', '.join(names)}" if names else f"there are no kernels for {device['platform']}: XLA runs everything")
    n, k = document["size"]
    title = f"products with a weight of {n} x {k}, {document['dtype']} activations"
    table = Table(title=title, title_justify="left")
    for name in ("weight", "activations", *(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS)):
        table.add_column(name, overflow="fold")
    table.add_column("why not a kernel", overflow="fold")
    for first in range(0, len(paths), len(ROWS)):
        mine = paths[first : first + len(ROWS)]
        table.add_row(mine[0].weight, mine[0].activation or "float", *(path.kernel for path in mine), _why(mine))
    return "\n".join([*lines, "", render(table), "", render(_caches(document))])


def _caches(document: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"a token decoded on a packed cache with qjax.cached_attention, 128 channels, {document['dtype']} queries"
    table = Table(title=title, title_justify="left")
    for name in ("keys and values", "kernel", "why not a kernel"):
        table.add_column(name, overflow="fold")
    for row in document["caches"]:
        table.add_row(row["spec"], row["kernel"], "; ".join(row["reasons"]))
    return table


def _why(paths: list[Any]) -> str:
    """Why XLA runs what it runs, each reason once."""
    reasons = [text for path in paths if path.kernel == "xla" for _, text in path.reasons]
    return "; ".join(dict.fromkeys(reasons))
