"""Report: what would be or was quantized, one row a parameter, as data and as a table."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, or one product of two activations that a rule names.

    Attributes:
      path: its path.
      shape: its shape.
      dtype: its float dtype.
      ops: the primitives of its sites, `("gather", "dot_general")` for a tied embedding; empty if it has none.
      scopes: the name stacks of its sites.
      spec: what it becomes, "" if it stays float.
      method: how, "" if it stays float.
      bits_per_weight: with scales, zero points and permutations.
      nbytes: bytes now.
      float_nbytes: bytes before.
      error: relative error of the weights |w - w_hat|^2 / |w|^2; None where nothing was computed.
      activation: what becomes of the activations that it meets, "" if they stay float.
      kernel: what runs it on jax's default device: a kernel's name, or one that begins with "xla".
      kernel_reasons: why faster kernels do not, "name: reason".
      reason: why it stays float, "" otherwise.
      notes: what the method has to say (damping raised, dead columns, rounded because no data reached it).
      what: "parameter", or "product": then `path` is its name, `shape` and `dtype` are those of the result, `spec` is empty,
        `activation` says what its operands become ("" if they stay float), and the bytes are those of its scales.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    ops: tuple[str, ...]
    scopes: tuple[str, ...]
    spec: str
    method: str
    bits_per_weight: float
    nbytes: int
    float_nbytes: int
    error: float | None = None
    activation: str = ""
    kernel: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    what: Literal["parameter", "product"] = "parameter"
    kernel_reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows and remarks. `print` shows a table; `rows` is the data; `to_json` for programs.

    Attributes:
      rows: one for each parameter, then one for each product of two activations that a rule names.
      notes: remarks on the whole program, such as arrays that were closed over.
      seconds: time taken, by phase; empty where nothing ran.
      memory: bytes of sequential methods: "live", the most values between two sites that were in memory, beside what the caller
        holds; "spilled", written to disk in all. Empty where no such method ran.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters now."""
        return sum(row.nbytes for row in self.rows)

    @property
    def float_nbytes(self) -> int:
        """Bytes of all parameters before."""
        return sum(row.float_nbytes for row in self.rows)

    def to_json(self) -> str:
        """Returns the report as a JSON document."""
        document = dataclasses.asdict(self) | {"nbytes": self.nbytes, "float_nbytes": self.float_nbytes}
        return json.dumps(document, indent=1)

    @property
    def summary(self) -> str:
        """How much was or would be quantized, in one line."""
        quantized = [r for r in self.rows if r.spec]
        sizes = f"{format_bytes(self.float_nbytes)} -> {format_bytes(self.nbytes)}"
        planned = bool(quantized) and all(row.error is None for row in quantized)
        verb = "would be quantized" if planned else "quantized"
        products = [r for r in self.rows if r.what == "product"]
        text = f"{len(quantized)} of {len(self.rows) - len(products)} parameters {verb}, {sizes}"
        if products:
            text += f", and {sum(bool(r.activation) for r in products)} of {len(products)} named products of two activations"
        return text

    def __rich__(self) -> Table:
        legend = ("error: |w - w_hat|^2 / |w|^2 of the weights",) if any(row.error is not None for row in self.rows) else ()
        caption = "\n".join((*legend, *self.notes)) or None
        table = Table(title=self.summary, title_justify="left", caption_justify="left", caption=caption)
        table.add_column("parameter", no_wrap=True)
        for name in ("shape", "op", "spec", "method"):
            table.add_column(name, overflow="fold")
        for name in ("bits", "bytes", "error"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("notes", overflow="fold", min_width=14)
        shown = any(row.kernel and not row.kernel.startswith("xla") for row in self.rows)  # there are kernels besides XLA's
        if shown:
            table.add_column("kernel", overflow="fold")
        for row in self.rows:
            table.add_row(*_cells(row), *([_kernel(row)] if shown else []), style=None if row.spec or row.activation else "dim")
        return table

    def __str__(self) -> str:
        return render(self)


def render(value: Any, width: int | None = None) -> str:
    """Renders anything rich can show as plain text, as wide as the terminal unless told; 140 columns where there is none.

    Wider where the columns need it: a line that wraps can be read, numbers and names that are cut off cannot.
    """
    width = width or shutil.get_terminal_size((140, 24)).columns
    value = value.__rich__() if hasattr(value, "__rich__") else value
    least = _keep_words(value) if isinstance(value, Table) else 0
    width = max(width, least)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(value, width=width, crop=False, no_wrap=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))  # pyright: ignore[reportAttributeAccessIssue]


def _keep_words(table: Table) -> int:
    """Makes every column as wide as its longest word, or longest line where it must not wrap; returns the table's least width.

    A console as narrow as the terminal would say that its own width is the least.
    """
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    for column in table.columns:
        texts = [console.render_str(str(cell)).plain for cell in (column.header, *column.cells)]
        pieces = (piece for text in texts for piece in (text.splitlines() if column.no_wrap else text.split()))
        column.min_width = max((cell_len(piece) for piece in pieces), default=1)
    return Measurement.get(console, console.options, table).minimum


def _cells(row: Row) -> Sequence[str]:
    return (
        row.path,
        "x".join(map(str, row.shape)),
        ", ".join(dict.fromkeys(row.ops)),
        " x ".join(filter(None, (row.spec, row.activation))) or row.dtype,
        row.method,
        f"{row.bits_per_weight:.2f}" if row.what == "parameter" else "",
        format_bytes(row.nbytes),
        "" if row.error is None else f"{row.error:.2e}",
        "; ".join(filter(None, (row.reason, *row.notes))),
    )


def _kernel(row: Row) -> str:
    """What runs it; where that is XLA, why no kernel does."""
    if not row.kernel.startswith("xla") or not row.kernel_reasons:
        return row.kernel
    return f"{row.kernel} ({'; '.join(row.kernel_reasons)})"


def format_bytes(n: int) -> str:
    """Writes a number of bytes for people, `3.77 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"
