"""What the commands share: opening a model, float or packed; progress; output."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SHIPPED = "books-llama-4m"
CONTEXT_LIMIT = 2048  # tokens of a window where a model could take more and the user did not say

# What chooses a range: names of the library's observers.
OBSERVERS = ["minmax", "absmax", "moving-average", "percentile", "entropy", "mse"]
# Remedies of the library that are options here.
_WORDS = (
    ("`group_size`=", "--group-size "),
    ("or pad=True, which pads", "or --pad, which pads"),
    ("`where` ", "--only "),
    ("take a shorter `window` or a smaller `group_size`, or leave it float", "take a shorter --kv-window, or leave --kv-cache away"),
    ("`resume` ", "--resume: "),
    ("give another folder, or remove this one to begin anew", "give another DST, or remove that folder to begin anew"),
    ("which no quantization kept: give a new folder", "which no quantization kept: give another DST, or remove that folder"),
)

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else there.")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A language model that was opened.

    Attributes:
      name: as the user gave it.
      config: sizes, a `LlamaConfig`.
      params: {"params": tree}, `QTensor` where packed; those of a float model in float32.
      tokenizer: or None.
      apply: `apply(params, tokens[, cache, position])`, in float32.
      forward: `apply` without a cache, jitted.
      disk_bytes: of the files that hold the weights.
      stored: the dtype in which a float model is stored; float32 if its tensors differ.
      document: what the packed checkpoint says of itself; None of a float one.
    """

    name: str
    config: Any
    params: Any
    tokenizer: Any
    apply: Callable[..., Any]
    forward: Callable[..., Any]
    disk_bytes: int
    stored: Any = None
    document: Any = None

    @property
    def start_ids(self) -> list[int]:
        """What stands before a text."""
        return [] if self.config.bos_token_id is None else [self.config.bos_token_id]


def in_options(text: str) -> str:
    """Says what the library says of its arguments of the options that set them.

    >>> in_options("`group_size`=7 does not divide the 48 contracted values of `w`: take 8, or pad=True, which pads them to 49")
    '--group-size 7 does not divide the 48 contracted values of `w`: take 8, or --pad, which pads them to 49'
    """
    for said, option in _WORDS:
        text = text.replace(said, option)
    return text


def observer_of(name: str, percentile: float | None = None) -> Any:
    """The observer of `OBSERVERS` with a name; `percentile` is for the one that has one."""
    import qjax

    make = getattr(qjax, name.replace("-", "_"))
    return make() if percentile is None else make(percentile)


def open_model(name: str) -> Model:
    """Opens a model.

    Args:
      name: a Hugging Face folder, a packed checkpoint, or the name of the shipped model.

    Returns:
      The model, with its parameters in memory.

    Raises:
      FileNotFoundError: there is no such model, or a file of it is missing.
      ValueError: a damaged file, or an architecture that is not supported.
    """
    from qjax.formats.checkpoint import DOCUMENT
    from qjax.formats.huggingface import CONFIG_FILE

    folder = model_folder(name)
    if (folder / DOCUMENT).is_file():
        return _open_packed(name, folder)
    if (folder / CONFIG_FILE).is_file():
        return _open_float(name, folder)
    what = f"holds neither {CONFIG_FILE} nor {DOCUMENT}" if folder.is_dir() else "is not a folder"
    raise FileNotFoundError(f"model {name!r} {what}: give a Hugging Face Llama folder, a folder that `qjax quantize` made, "
                            f"or {SHIPPED}")  # fmt: skip


def model_folder(name: str) -> Path:
    """The folder that the name of a model stands for."""
    from qjax.models import books_llama_folder

    return books_llama_folder() if name == SHIPPED else Path(name)


def _open_float(name: str, folder: Path) -> Model:
    from qjax.formats.huggingface import load_checkpoint
    from qjax.formats.safetensors import FLOAT_DTYPES, tensor_index

    index = tensor_index(folder)
    dtypes = {info.dtype for info in index.values()}
    checkpoint = load_checkpoint(folder)
    size = sum(file.stat().st_size for file in {info.file for info in index.values()})
    stored = FLOAT_DTYPES[dtypes.pop() if len(dtypes) == 1 else "F32"]
    params, programs = {"params": checkpoint.params}, programs_of(checkpoint.config, packed=False)
    return Model(name, checkpoint.config, params, checkpoint.tokenizer, *programs, size, stored)


def _open_packed(name: str, folder: Path) -> Model:
    import qjax
    from qjax.formats.checkpoint import read_document

    document = read_document(folder)
    config, tokenizer = _described(name, document.metadata)
    size = packed_bytes(folder, document.metadata)
    result = qjax.load(folder)
    model = packed_model(name, config, result.params, tokenizer, size)
    if result.sites:
        apply, forward = _with_sites(config, result.sites)
        model = dataclasses.replace(model, apply=apply, forward=forward)
    return dataclasses.replace(model, document=document)


def _described(name: str, metadata: dict[str, Any]) -> tuple[Any, Any]:
    """Config and tokenizer from the metadata that `describe_model` made."""
    from qjax.formats.huggingface import TOKENIZER_FILE, load_tokenizer
    from qjax.formats.llama_config import LlamaConfig

    values, text = metadata.get("config"), metadata.get("tokenizer")
    if not isinstance(values, dict) or not isinstance(text, (str, type(None))):
        raise ValueError(f"packed checkpoint {name!r} does not say what model it holds: it was saved by qjax.save alone; "
                         "load it with qjax.load, or make it with `qjax quantize`")  # fmt: skip
    config = LlamaConfig.from_hf(values)
    if text is None:
        return config, None
    with tempfile.TemporaryDirectory() as folder:  # through a file, for its reader checks what it reads
        Path(folder, TOKENIZER_FILE).write_text(text, encoding="utf-8")
        return config, load_tokenizer(folder, config)


def describe_model(model: Model) -> dict[str, Any]:
    """The metadata with which a packed checkpoint stands alone: the model's config and tokenizer."""
    tokenizer = None if model.tokenizer is None else model.tokenizer.to_str()
    return {"model": Path(model.name).name, "config": model.config.to_hf(), "tokenizer": tokenizer}


def packed_model(name: str, config: Any, params: Any, tokenizer: Any, disk_bytes: int) -> Model:
    """A model whose parameters are packed."""
    return Model(name, config, params, tokenizer, *programs_of(config, packed=True), disk_bytes)


@functools.lru_cache(maxsize=8)
def programs_of(config: Any, packed: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`apply` and `forward` of a model: the same objects for the same config, for jit keeps what it compiled by them."""
    import jax

    import qjax
    from qjax.models import Llama

    apply = qjax.quantized(Llama(config).apply) if packed else Llama(config).apply
    return apply, jax.jit(apply)


def _with_sites(config: Any, sites: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`programs_of` a packed model some of whose products of two activations multiply integers."""
    import jax

    import qjax
    from qjax.models import Llama

    apply = qjax.quantized(Llama(config).apply, sites=sites)
    return apply, jax.jit(apply)


def packed_bytes(folder: Path, metadata: dict[str, Any]) -> int:
    """Bytes of all files of a packed checkpoint, without the tokenizer that rides along."""
    tokenizer = metadata.get("tokenizer")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) - len(json.dumps(tokenizer or ""))


def check_tokenizer(model: Model) -> None:
    """Refuses a model that cannot read text."""
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer.json, which turns text into tokens: put it into the folder"
                         + (" of the float model and quantize again" if model.document is not None else ""))  # fmt: skip


def window_length(model: Model, window: int | None) -> int:
    """Tokens a window: what the user said, or the context of the model up to a limit."""
    context = model.config.max_position_embeddings
    if window is not None and window > context:
        raise ValueError(f"--window {window} exceeds the context of {model.name!r}, {context} tokens: give at most that")
    return min(context, CONTEXT_LIMIT) if window is None else window


def read_text(path: str | Path) -> str:
    """Reads a UTF-8 file, or says that it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 text (byte {error.start}): convert it") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """Where a piece of work says how far it is: call it with (done, all), or `show` it a `qjax.Progress`."""

    call: Callable[[int, int], None]
    show: Callable[[Any], None] = lambda event: None

    def __call__(self, done: int, total: int) -> None:
        self.call(done, total)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], Update]]:
    """Shows progress on stderr: bars on a terminal, elsewhere a line when something is done.

    Yields:
      A callable that takes the name of a piece of work, begins it, and gives its `Update`.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        yield _line_at_end
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    with Progress(*columns, console=console) as bar:
        try:
            yield lambda name: _moving(bar, name)
        except BaseException:
            bar.live.transient = True  # what is to be read now is the error
            raise


def _moving(bar: Progress, name: str) -> Update:
    task = bar.add_task(name, total=None, left="")

    def show(event: Any) -> None:
        text = f"{name}: {event.phase} {event.path}".rstrip()
        bar.update(task, description=text, completed=event.done, total=event.total, left=remaining_text(event.remaining))

    return Update(lambda done, total: bar.update(task, description=name, completed=done, total=total, left=""), show)


def remaining_text(seconds: float | None) -> str:
    """The time that remains, for people.

    >>> remaining_text(75.0), remaining_text(None)
    ('1:15 left', '')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"


def _line_at_end(name: str) -> Update:
    started, said = time.perf_counter(), []

    def update(done: int, total: int) -> None:
        if done == total and not said:
            said.append(True)
            click.echo(f"{name}: {time.perf_counter() - started:.1f} s", err=True)

    return Update(update)


def emit(document: dict[str, Any]) -> None:
    """Writes the JSON document of a command; what JSON has no number for (NaN) becomes null."""
    click.echo(json.dumps(_plain(document), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def platform() -> str:
    """What ran it: the kind of device and how many, for a CPU its cores."""
    import jax

    devices = jax.devices()
    return f"cpu, {os.cpu_count()} cores" if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}"
