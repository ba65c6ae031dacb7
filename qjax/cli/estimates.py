"""What `qjax bench --target` prints: products estimated for a chip that is not there."""

from typing import Any

import click

from qjax.cli.shared import emit

TARGETS = {"v5e": ("tpu", "v5e", 1), "v5p": ("tpu", "v5p", 1), "v6e": ("tpu", "v6e", 1), "tpu7x": ("tpu", "tpu7x", 1),
           "h200": ("cuda", "sm_90a", 132)}  # fmt: skip
NOTE = "an estimate from counted instructions and bytes, without what a launch takes; no measurement"


def show(target: str, products: list[tuple[str, Any]], as_json: bool) -> None:
    """Prints what products would take.

    Args:
      target: one of `TARGETS`.
      products: (name of the spec, request).
      as_json: as a document.
    """
    rows = [_row(name, request) for name, request in products]
    document = {"target": target, "estimate": True, "note": NOTE, "products": rows}
    if as_json:
        emit(document)
        return
    from rich.table import Table

    from qjax.report import render

    steps, inside = ("blocks", "wgmma") if target == "h200" else ("steps", "bundles")
    table = Table(title=f"microseconds on {target}, {NOTE}", title_justify="left")
    for name in ("weight", "spec", "rows", steps, inside, "MB", "compute", "memory", "both", "bf16", "speedup"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        head = (f"{row['n']} x {row['k']}", row["spec"], str(row["rows"]))
        if "why_not" in row:
            table.add_row(*head, *[""] * 8)
            continue
        times = (f"{row[name] * 1e6:.1f}" for name in ("compute", "memory", "seconds", "bf16"))
        table.add_row(*head, str(row["steps"]), str(row["instructions"]), f"{row['bytes'] / 1e6:.1f}", *times, f"{row['speedup']:.2f}x")
    click.echo(render(table))
    for reason in dict.fromkeys(f"{row['spec']}: {row['why_not']}" for row in rows if "why_not" in row):
        click.echo(f"no estimate for {reason}")


def _row(name: str, request: Any) -> dict[str, Any]:
    """One product; instructions are the bundles of a grid step, or the tensor core instructions of a thread block."""
    from qjax_kernels.gpu import cost as on_gpu
    from qjax_kernels.tpu import cost as on_tpu

    from qjax.runtime.installed import installed_kernels
    from qjax.runtime.kernels import choose

    row = {"spec": name, "n": request.n, "k": request.k, "rows": request.m, "dtype": request.dtype}
    chosen = choose(request, installed_kernels(request.device.platform))
    if chosen.kernel is None:
        return row | {"why_not": "; ".join(f"{kernel}: {reason}" for kernel, reason in chosen.reasons)}
    model = on_tpu if request.device.platform == "tpu" else on_gpu
    reason = model.why_not(request)
    if reason:
        return row | {"why_not": f"{chosen.kernel.name} would run it, of which there is no estimate: {reason}"}
    cost, plain = model.estimate(request), model.estimate(request, "bf16")
    steps, inside = (cost.steps, cost.bundles) if request.device.platform == "tpu" else (cost.blocks, cost.products)  # pyright: ignore[reportAttributeAccessIssue]
    return row | {
        "kernel": chosen.kernel.name,
        "steps": steps,
        "instructions": inside,
        "bytes": cost.bytes,
        "compute": cost.compute,
        "memory": cost.memory,
        "seconds": cost.seconds,
        "bf16": plain.seconds,
        "speedup": plain.seconds / cost.seconds,
    }
