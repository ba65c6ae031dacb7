"""`qjax bench`: how long products take on every kernel, and `qjax tune`, which remembers the fastest."""

from typing import Any

import click

from qjax.cli.estimates import TARGETS, show
from qjax.cli.shared import emit, json_option

SPECS = ("int8", "int4", "uint4", "nf4", "int3", "int2", "int8+int8", "int4+int8")
ROWS = (1, 16, 128)


def _options(command: Any) -> Any:
    """What both commands measure."""
    for option in reversed([
        click.option("--size", "sizes", nargs=2, multiple=True, type=click.IntRange(min=1), metavar="N K",
                     help="Of the weight (N, K); may be given several times.  [default: those of a 7B model]"),
        click.option("--rows", multiple=True, type=click.IntRange(min=1), default=ROWS, show_default=True,
                     help="Of the activations; may be given several times."),
        click.option("--spec", "specs", multiple=True, type=click.Choice(SPECS), default=("int4", "int8", "int8+int8"), show_default=True,
                     help="Of the weight, +int8 where activations are rounded; may be given several times."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), help="Of the activations.  [default: float32 on CPUs]"),
        click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=0.5, show_default=True, help="To spend on each."),
        click.option("--warm", is_flag=True, help="Measure one weight that may stay in caches; by default so many that none does."),
        json_option,
    ]):  # fmt: skip
        command = option(command)
    return command


@click.command("bench")
@_options
@click.option("--target", type=click.Choice(list(TARGETS)), help="Estimate for this chip instead; nothing is measured.")
def command(
    sizes: Any,
    rows: tuple[int, ...],
    specs: tuple[str, ...],
    dtype: str | None,
    seconds: float,
    warm: bool,
    as_json: bool,
    target: str | None,
) -> None:
    """Measures products of packed weights on every kernel that takes them, on XLA, and with float weights.

    All ways take turns in one process; the numbers are medians. With --target it estimates from counted instructions and bytes what our
    kernels would take on a chip that need not be there.
    """
    if target is not None:
        from qjax.runtime import Device

        device = Device(*TARGETS[target])  # pyright: ignore[reportArgumentType]
        products = [(name, request) for name, _, _, request in _products(device, sizes, rows, specs, dtype or "bfloat16")]
        show(target, products, as_json)
        return
    runtime, timings = _measure(sizes, rows, specs, dtype, seconds, warm, as_json)
    _show(runtime, timings, as_json, {})


@click.command("tune")
@_options
@click.option("--folder", type=click.Path(file_okay=False), help="Where to keep it.  [default: qjax/kernels in the user's cache folder]")
def tune(
    sizes: Any,
    rows: tuple[int, ...],
    specs: tuple[str, ...],
    dtype: str | None,
    seconds: float,
    warm: bool,
    folder: str | None,
    as_json: bool,
) -> None:
    """Measures as `qjax bench` does, and remembers the fastest for this kind of device.

    `qjax.quantized` reads it when it traces a program. What was measured before stays.
    """
    from qjax.runtime.tuning import key_of, tuned_file, write_tuned

    runtime, timings = _measure(sizes, rows, specs, dtype, seconds, warm, as_json)
    path = tuned_file(runtime.device, folder)
    write_tuned(path, {key_of(timing.request): timing.fastest for _, timing in timings})
    _show(runtime, timings, as_json, {"file": str(path)})


def _measure(sizes: Any, rows: Any, specs: Any, dtype: Any, seconds: float, warm: bool, quiet: bool) -> tuple[Any, list[Any]]:
    from qjax.runtime import runtime_of
    from qjax.runtime.timing import time_product

    runtime = runtime_of()
    dtype = dtype or ("float32" if runtime.device.platform == "cpu" else "bfloat16")
    timings = []
    for name, spec, act, request in _products(runtime.device, sizes, rows, specs, dtype):
        if not quiet:
            click.echo(f"{name}, {request.n} x {request.k}, {request.m} rows", err=True)
        timings.append((name, time_product(spec, act, request, runtime, seconds=seconds, cold=not warm)))
    return runtime, timings


def _products(device: Any, sizes: Any, rows: Any, specs: Any, dtype: str) -> list[tuple[str, Any, Any, Any]]:
    """(name, spec of the weight, spec of the activations, request) of each product that is asked for."""
    from qjax.runtime import Request
    from qjax.runtime.request import weight_of

    found = []
    for n, k in sizes or _model_sizes():
        for name in specs:
            spec, act = _spec(name, k)
            form = weight_of(spec, k)
            found += [(name, spec, act, Request(device, m, n, k, form, dtype, "int8" if act else None)) for m in rows]  # pyright: ignore[reportArgumentType]
    return found


def _model_sizes() -> list[tuple[int, int]]:
    from qjax_kernels.shapes import MODEL

    return list(dict.fromkeys((case.n, case.k) for case in MODEL))


def _spec(name: str, k: int) -> tuple[Any, Any]:
    import qjax

    weight, _, act = name.partition("+")
    grouped = {} if weight in ("int8", "nf4") else {"group_size": 128 if k % 128 == 0 else k}
    return getattr(qjax, weight)(**grouped, pad=True), qjax.dynamic(qjax.int8()) if act else None


def _show(runtime: Any, timings: list[Any], as_json: bool, more: dict[str, Any]) -> None:
    device = runtime.device
    rows = [
        {
            "spec": name,
            "n": timing.request.n,
            "k": timing.request.k,
            "rows": timing.request.m,
            "dtype": timing.request.dtype,
            "seconds": timing.seconds,
            "fastest": timing.fastest,
            "speedup": timing.seconds["float"] / timing.seconds[timing.fastest],
        }
        for name, timing in timings
    ]
    document = {"device": {"platform": device.platform, "chip": device.chip, "cores": device.cores}, "products": rows, **more}
    if as_json:
        emit(document)
        return
    from rich.table import Table

    from qjax.report import render

    table = Table(title=f"microseconds on {device.platform}, {device.chip}; speedup of the fastest over float", title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    for name in ("weight", "spec", "rows", *names, "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        times = (f"{row['seconds'][name] * 1e6:.0f}" if name in row["seconds"] else "" for name in names)
        table.add_row(f"{row['n']} x {row['k']}", row["spec"], str(row["rows"]), *times, f"{row['speedup']:.2f}x")
    click.echo(render(table))
    if "file" in more:
        click.echo(f"kept in {more['file']}", err=True)
