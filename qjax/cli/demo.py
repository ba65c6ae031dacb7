"""`qjax demo`: the whole way on the model inside the package, and the table that it leads to."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from qjax.cli.shared import SHIPPED, Model, emit, json_option, platform, progress

PROMPT = "It was late in the evening when"
NEW_TOKENS, TEMPERATURE, TOP_K, SEED = 110, 0.8, 40, 1
BATCH = 4  # windows at a time when measuring: on a CPU more of them fall out of its cache
FLOAT, SHOWN = "float32", "int4 g128 gptq"  # the two that write a paragraph; the second goes to another process, too


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table: its name, and the options of `qjax quantize` that make it."""

    name: str
    weight: str
    method: str = "rtn"
    group_size: int | None = None

    @property
    def folder(self) -> str:
        """Where in the demo's folder it is saved."""
        return self.name.replace(" ", "-")

    @property
    def options(self) -> dict[str, Any]:
        """All options that make a policy."""
        rest = {"per": None, "keep": (), "keep_none": False, "mse": False, "act_order": False, "static_groups": False, "damping": None}
        return {"weight": self.weight, "method": self.method, "group_size": self.group_size, **rest}


RECIPES = (
    Recipe("int8 rtn", "int8"),
    Recipe("int4 g128 rtn", "int4", group_size=128),
    Recipe(SHOWN, "int4", "gptq", 128),
    Recipe("int3 g128 gptq", "int3", "gptq", 128),
)


@click.command("demo")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path),
              help="Keep the packed checkpoints here.  [default: a temporary folder, removed at the end]")
@click.option("--quick", is_flag=True, help="Less text: 32 windows to calibrate with and 32 to measure on, so other numbers.")
@json_option
def command(directory: Path | None, quick: bool, as_json: bool) -> None:
    """Quantizes the small Llama inside the package in four ways and shows what each cost.

    Perplexity, KL divergence from the float model and top-1 agreement on text that it never saw; bits a weight, bytes on
    disk and in memory, decoding speed. Then a second process loads the int4 checkpoint and must give the same logits to the
    last bit, and float and int4 write a paragraph each.
    """
    started = time.perf_counter()
    with _working_folder(directory) as folder, progress() as bar:
        document = _run(folder, 32 if quick else None, Stages(bar))
    document |= {"directory": None if directory is None else str(directory), "seconds": round(time.perf_counter() - started, 3)}
    emit(document) if as_json else _show(document)
    if not document["second_process"]["identical"]:
        raise click.ClickException("the logits of the second process differ from those of the first: please report this")


@contextlib.contextmanager
def _working_folder(directory: Path | None) -> Iterator[Path]:
    from qjax.cli.quantize import check_destination

    if directory is None:
        with tempfile.TemporaryDirectory(prefix="qjax-demo-") as folder:
            yield Path(folder)
        return
    for recipe in RECIPES:
        check_destination(directory / recipe.folder, overwrite=False)
    yield directory


class Stages:
    """A progress bar a stage, and the seconds that each took."""

    def __init__(self, bar: Any):
        self.bar, self.seconds = bar, {}

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Runs a stage; gives a callable that advances its bar."""
        started = time.perf_counter()
        task = self.bar.add_task(name, total=total)
        yield lambda n=1: self.bar.advance(task, n)
        self.seconds[name] = round(time.perf_counter() - started, 3)


def _run(folder: Path, count: int | None, stages: Stages) -> dict[str, Any]:
    """All stages in turn; gives the document of `--json`."""
    from qjax.cli.measure import score, sizes

    with stages("loading", 1) as advance:
        model, rows, calibration = _inputs(count)
        advance()
    models = {FLOAT: model} | _quantized(model, calibration, folder, stages)
    every = list(models.values())
    second = _compiled(models, rows[:BATCH], folder, stages)
    with stages("measuring", len(rows) * len(every)) as advance:
        scores = score(every, rows, BATCH, True, advance)
    made = {}
    with stages("writing", len(every)) as advance:
        for name, each in models.items():
            made[name] = _generation(each, NEW_TOKENS)
            advance()
    return {
        "rows": [
            {"model": name, **found.numbers, **sizes(each), "tokens_per_second": made[name].tokens_per_second}
            for (name, each), found in zip(models.items(), scores, strict=True)
        ],
        "second_process": second,
        "prompt": PROMPT,
        "paragraphs": {name: model.tokenizer.decode(made[name].tokens[0].tolist()) for name in (FLOAT, SHOWN)},
        "windows": len(rows),
        "window": rows.shape[1],
        "calibration_windows": len(calibration),
        "speed_note": f"tokens a second: decoding of one prompt, {NEW_TOKENS} new tokens, without compilation",
        "platform": platform(),
        "stage_seconds": stages.seconds,
    }


def _inputs(count: int | None) -> tuple[Model, Any, Any]:
    """The model, windows to measure on, windows to calibrate with."""
    from qjax.cli.evaluate import text_rows
    from qjax.cli.quantize import calibration_rows, open_float
    from qjax.models import books_llama_folder, calibration_lines

    model = open_float(SHIPPED)
    rows = text_rows(model, books_llama_folder() / "heldout.txt", None)[:count]
    calibration, _ = calibration_rows(model, calibration_lines(), count or 128, rows.shape[1])
    return model, rows, calibration


def _quantized(model: Model, calibration: Any, folder: Path, stages: Stages) -> dict[str, Model]:
    """The quantized models by name; each is saved."""
    from qjax.cli.quantize import batches_of, describe_model, make_policy, quantize_model, save
    from qjax.cli.shared import packed_bytes, packed_model

    metadata, batches = describe_model(model), batches_of(calibration, 8)
    packed = packed_model("", model.config, None, model.tokenizer, 0)  # one program for all of one shape
    bars = {recipe.name: stages.bar.add_task(f"  {recipe.name}", total=None, start=False) for recipe in RECIPES}

    def make(recipe: Recipe, check: Callable[[], None]) -> Model:
        stages.bar.start_task(bars[recipe.name])

        def advance(done: int, total: int) -> None:
            check()
            stages.bar.update(bars[recipe.name], completed=done, total=total)

        result = quantize_model(model, make_policy(model, recipe.options), batches, advance)
        save(folder / recipe.folder, result, model, metadata, overwrite=False)
        size = packed_bytes(folder / recipe.folder, metadata)
        return dataclasses.replace(packed, name=recipe.name, params=result.params, disk_bytes=size)

    with stages("quantizing", len(RECIPES)) as advance:
        longest_first = sorted(RECIPES, key=lambda recipe: recipe.method != "gptq")
        made = {each.name: each for each in _two_at_a_time(make, longest_first, advance)}
    return {recipe.name: made[recipe.name] for recipe in RECIPES}


def _compiled(models: dict[str, Model], tokens: Any, folder: Path, stages: Stages) -> dict[str, Any]:
    """Compiles what will be timed, while a second process loads a checkpoint; gives what that process found.

    Models whose parameters have one structure share their programs, so one of them is enough.
    """
    import jax

    from qjax.cli.digest import digest

    def second_process() -> dict[str, Any]:
        there = _second_process(folder / next(r.folder for r in RECIPES if r.name == SHOWN), tokens)
        here = digest(models[SHOWN], tokens)
        return {"identical": here["sha256"] == there["sha256"], "here": here, "there": there}

    def compile_programs(model: Model) -> None:
        digest(model, tokens)
        _generation(model, 2)

    distinct = {jax.tree.structure(model.params): model for model in models.values()}
    work = [second_process, *(lambda model=model: compile_programs(model) for model in distinct.values())]
    with stages("compiling, and loading in a second process", len(work)) as advance:
        return _two_at_a_time(lambda each, _: each(), work, advance)[0]


def _two_at_a_time(work: Callable[[Any, Callable[[], None]], Any], items: Sequence[Any], advance: Callable[[], None]) -> list[Any]:
    """Works on two items at once: compilation keeps one core busy, so two of them take half the time.

    Args:
      work: called with an item and a `check` to be called now and then: it raises when another item has failed.
      items: in the order in which they are begun.
      advance: called when an item is done.

    Returns:
      The results in the order of the items.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def one(item: Any) -> Any:
        check()
        result = work(item, check)
        advance()
        return result

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(one, item) for item in items]
        try:
            # A timeout, for without one a thread that waits does not hear Ctrl-C on every system.
            while not all(future.done() for future in futures):
                failed = next((f for f in futures if f.done() and f.exception() is not None), None)
                if failed is not None:
                    failed.result()
                time.sleep(0.02)
            return [future.result() for future in futures]
        finally:
            stop.set()


class _Stopped(Exception):
    """Another thread has failed, or the user has had enough."""


def _second_process(folder: Path, tokens: Any) -> dict[str, Any]:
    """The digest of the logits of a saved checkpoint, from a new process of the same interpreter."""
    command = [sys.executable, "-m", "qjax.cli.digest", str(folder)]
    done = subprocess.run(command, input=json.dumps(tokens.tolist()), capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise OSError(f"the second process could not run {str(folder)!r}: {' '.join(done.stderr.split())[-500:]}")
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    """The environment in which another process finds the same package, wherever this one found it."""
    import qjax

    root = str(Path(qjax.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _generation(model: Model, new_tokens: int) -> Any:
    import jax

    from qjax.cli.measure import run
    from qjax.evaluation import encode

    ids = [*model.start_ids, *encode(model.tokenizer, PROMPT).tolist()]
    return run(model, ids, new_tokens, temperature=TEMPERATURE, top_k=TOP_K, key=jax.random.key(SEED))


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    from qjax.cli.evaluate import score_table

    console = Console(highlight=False)
    rows, second = document["rows"], document["second_process"]
    console.print(f"\n[bold]{SHIPPED}[/bold], {document['windows']} windows of {document['window']} tokens it never saw; "
                  f"gptq calibrated with {document['calibration_windows']} windows of other books\n")  # fmt: skip
    console.print(score_table(rows, [row["model"] for row in rows]))
    console.print(f"{document['speed_note']}; {document['platform']}\n", style="dim")
    verdict = "[bold green]bit-identical[/bold green]" if second["identical"] else "[bold red]DIFFERENT[/bold red]"
    console.print(f"second process, from the {SHOWN} checkpoint: {second['there']['logits']:,} logits {verdict}")
    console.print(f"  sha256 here  {second['here']['sha256']}\n  sha256 there {second['there']['sha256']}\n")
    side = Table.grid(expand=True, padding=(0, 1))
    for _ in document["paragraphs"]:
        side.add_column(ratio=1)
    side.add_row(*(Panel(text, title=name) for name, text in document["paragraphs"].items()))
    console.print(side)
    if document["directory"] is not None:
        console.print(f"\nkept in {document['directory']}; try: qjax inspect {Path(document['directory']) / SHOWN.replace(' ', '-')}",
                      markup=False, soft_wrap=True)  # fmt: skip
    console.print(f"\n[bold]{document['seconds']:.1f} s[/bold]")
