"""How a program prints."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qjax.program.trace import Program


def program_table(program: Program) -> str:
    """Renders a program's sites, why its other parameters have none, and the products that a rule may name."""
    table = Table(title=f"{len(program.sites)} sites, {len(program.leaves)} parameters", title_justify="left")
    for name in ("parameter", "shape", "op", "contracted", "kept", "stacked", "input", "scope"):
        table.add_column(name, overflow="fold")
    for site in program.sites:
        shape = program.leaves[site.leaf].shape
        axes = (",".join(map(str, a)) for a in (site.contracted, site.kept, site.stacked))
        table.add_row(site.path, _shape(shape), site.op, *axes, _shape(site.x_shape), site.scope)
    for leaf in program.leaves:
        if not leaf.sites:
            table.add_row(leaf.path, _shape(leaf.shape), f"no site: {', '.join(leaf.consumers) or 'unused'}", style="dim")
    for shape, dtype in program.closed_over:
        table.add_row("(closed over)", _shape(shape), f"{dtype} array is no argument: it cannot be quantized", style="dim")
    console = Console(file=io.StringIO(), width=140, color_system=None)
    console.print(table)
    if program.products:
        console.print(_products_table(program))
    return console.file.getvalue().rstrip("\n")  # pyright: ignore[reportAttributeAccessIssue]


def _products_table(program: Program) -> Table:
    title = f"{len(program.products)} products of two activations, which stay float unless a rule names them"
    table = Table(title=title, title_justify="left")
    table.add_column("product", no_wrap=True)
    for name in ("left", "right", "contracted", "layers", "note"):
        table.add_column(name, overflow="fold")
    for product in program.products:
        contracted = " and ".join(",".join(map(str, dims)) for dims in product.contracted)
        layers = _shape(product.turns) if product.turns else ""
        sides = (f"{_shape(shape)} of {maker}" for shape, maker in zip(product.shapes, product.made_by, strict=True))
        table.add_row(product.name, *sides, contracted, layers, product.refusal)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
