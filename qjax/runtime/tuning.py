"""Which kernel was the fastest for which products on a kind of device: measured once, kept in a file, read when a program is traced."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping

from qjax_kernels.request import Device, Request

from qjax.disk import write_whole

_FORMAT = "qjax kernels 1"


def key_of(request: Request) -> str:
    """What is remembered of a product: all of it but the device, rows rounded up to a power of two.

    >>> from qjax_kernels.request import Weight
    >>> key_of(Request(Device("cpu", "avx2"), 5, 64, 128, Weight("int", 4, 32), "float32"))
    'int4 group 32, float32, 64 x 128, 8 rows'
    """
    weight, rows = request.weight, 1 << (request.m - 1).bit_length()
    group = "channel" if weight.group_size is None else f"group {weight.group_size}"
    act = "" if request.activation is None else f" {request.activation}"
    act = act if request.rotation is None else f"{act} rotated"
    parts = "" if request.parts == 1 else f"{request.parts} x "
    parts = f"ragged {parts}" if request.ragged else parts
    return f"{weight.kind}{weight.bits} {group}, {request.dtype}{act}, {parts}{request.n} x {request.k}, {rows} rows"


def tuned_file(device: Device, folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The file for a kind of device: in `folder`, or in qjax's in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    base = pathlib.Path(folder) if folder is not None else pathlib.Path(home) / "qjax" / "kernels"
    name = "".join(c if c.isalnum() else "-" for c in f"{device.platform}-{device.chip}-{device.cores}")
    return base / f"{name}.json"


def read_tuned(path: pathlib.Path) -> dict[str, str]:
    """Reads what was measured.

    Args:
      path: of the file.

    Returns:
      Names of kernels by `key_of`; empty where there is no file.

    Raises:
      ValueError: the file is no such file.
    """
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: delete it, or run `qjax tune` again") from error
    fastest = data.get("fastest") if isinstance(data, dict) and data.get("format") == _FORMAT else None
    if not isinstance(fastest, dict) or not all(isinstance(v, str) for v in fastest.values()):
        raise ValueError(f"{path} is not what `qjax tune` of this version writes: delete it, or run it again")
    return fastest


def write_tuned(path: pathlib.Path, fastest: Mapping[str, str]) -> None:
    """Adds what was measured to a file, which appears whole or stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = read_tuned(path) | dict(fastest)
    write_whole(path, [json.dumps({"format": _FORMAT, "fastest": dict(sorted(whole.items()))}, indent=1).encode()])
