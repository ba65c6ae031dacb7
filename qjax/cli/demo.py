"""`qjax demo`: the whole way on the model inside the package, and the table that it leads to."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from qjax.cli.shared import SHIPPED, Model, emit, json_option, platform, progress

PROMPT = "It was late in the evening when"
NEW_TOKENS, TEMPERATURE, TOP_K, SEED = 110, 0.8, 40, 1
SHOWN = "int4 g128 gptq"  # the one that is sent to a second process and writes the paragraph


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table: its name, and the options of `qjax quantize` that make it."""

    name: str
    weight: str
    method: str = "rtn"
    group_size: int | None = None

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def options(self) -> dict[str, Any]:
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
        document = _run(folder, quick, bar)
    document |= {"directory": None if directory is None else str(directory), "seconds": round(time.perf_counter() - started, 3)}
    emit(document) if as_json else _show(document)
    if not document["second_process"]["identical"]:
        raise click.ClickException("the logits of the second process differ from those of the first: please report this")


def _run(folder: Path, quick: bool, bar: Any) -> dict[str, Any]:
    stages = Stages(bar)
    count = 32 if quick else None
    with stages("loading", 1):
        model, rows, calibration = _inputs(count)
    models = {"float": model} | _quantized(model, calibration, folder, stages)
    with stages("checking in a second process", 1):
        second = _second_process(models[SHOWN], folder / _recipe(SHOWN).folder, rows[:4])
    table = _measured(models, rows, stages)
    return {
        "rows": table["rows"],
        "second_process": second,
        "prompt": PROMPT,
        "paragraphs": table["paragraphs"],
        "windows": len(rows),
        "window": rows.shape[1],
        "calibration_windows": len(calibration),
        "speed_note": f"decoding speed: one prompt, {NEW_TOKENS} new tokens, sampled",
        "platform": platform(),
        "stage_seconds": stages.seconds,
    }


class Stages:
    """A progress bar a stage, and the seconds that each took."""

    def __init__(self, bar: Any):
        self.bar, self.seconds = bar, {}

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Any]:
        """Runs a stage; gives a callable that advances its bar, which is full at the end."""
        started = time.perf_counter()
        task = self.bar.add_task(name, total=total)
        yield lambda n=1: self.bar.advance(task, n)
        self.bar.update(task, completed=total)
        self.seconds[name] = round(time.perf_counter() - started, 3)


def _recipe(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if recipe.name == name)


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

    metadata, made = describe_model(model), {}
    packed = packed_model("", model.config, None, model.tokenizer, 0)  # one program for all
    for recipe in RECIPES:
        with stages(f"quantizing {recipe.name}", 28) as advance:
            seen = [0]

            def update(done: int, total: int) -> None:
                advance(done - seen[0])
                seen[0] = done

            result = quantize_model(model, make_policy(model, recipe.options), batches_of(calibration, 8), update)
            save(folder / recipe.folder, result, model, metadata, overwrite=False)
        size = packed_bytes(folder / recipe.folder, metadata)
        made[recipe.name] = dataclasses.replace(packed, name=recipe.name, params=result.params, disk_bytes=size)
    return made


def _second_process(model: Model, folder: Path, tokens: Any) -> dict[str, Any]:
    """Compares the logits with those that another process computes from the saved checkpoint."""
    from qjax.cli.digest import digest

    command = [sys.executable, "-m", "qjax.cli.digest", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=_environment()) as other:  # fmt: skip
        here = digest(model, tokens)
        out, err = other.communicate(json.dumps(tokens.tolist()))
    if other.returncode:
        raise OSError(f"the second process could not load {str(folder)!r}: {' '.join(err.split())[-500:]}")
    there = json.loads(out)
    return {"identical": here["sha256"] == there["sha256"], "here": here, "there": there}


def _environment() -> dict[str, str]:
    """The environment in which another process finds the same package, wherever this one found it."""
    import qjax

    root = str(Path(qjax.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _measured(models: dict[str, Model], rows: Any, stages: Stages) -> dict[str, Any]:
    """The rows of the table, and the paragraphs."""
    from qjax.cli.measure import batch_count, score, sizes

    every = list(models.values())
    with stages("measuring on unseen text", batch_count(rows, every)) as advance:
        scores = score(every, rows, 8, True, advance)
    texts, speeds = {}, {}
    with stages("writing", len(every)) as advance:
        for name, model in models.items():
            texts[name], speeds[name] = _paragraph(model)
            advance()
    measured = [
        {"model": name, **found.numbers, **sizes(model), "tokens_per_second": speeds[name]}
        for (name, model), found in zip(models.items(), scores, strict=True)
    ]
    return {"rows": measured, "paragraphs": {name: texts[name] for name in ("float", SHOWN)}}


def _paragraph(model: Model) -> tuple[str, float | None]:
    import jax

    from qjax.cli.measure import run
    from qjax.evaluation import encode

    ids = [*model.start_ids, *encode(model.tokenizer, PROMPT).tolist()]
    made = run(model, ids, NEW_TOKENS, temperature=TEMPERATURE, top_k=TOP_K, key=jax.random.key(SEED))
    return model.tokenizer.decode(made.tokens[0].tolist()), made.tokens_per_second


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


def _show(document: dict[str, Any]) -> None:
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    from qjax.cli.evaluate import score_table

    console = Console(highlight=False)
    rows = document["rows"]
    console.print()
    console.print(f"[bold]{SHIPPED}[/bold]: {document['windows']} windows of {document['window']} tokens it never saw; "
                  f"gptq with {document['calibration_windows']} windows of other text")  # fmt: skip
    console.print(score_table(rows, [row["model"] for row in rows]))
    console.print(f"{document['speed_note']}; {document['platform']}", style="dim")
    second = document["second_process"]
    console.print()
    console.print(f"second process: loaded {SHOWN}, {second['there']['logits']:,} logits "
                  + ("[bold green]bit-identical[/bold green]" if second["identical"] else "[bold red]DIFFERENT[/bold red]"))  # fmt: skip
    console.print(f"  sha256 here  {second['here']['sha256']}")
    console.print(f"  sha256 there {second['there']['sha256']}")
    console.print()
    side = Table.grid(expand=True, padding=(0, 1))
    side.add_column(ratio=1)
    side.add_column(ratio=1)
    side.add_row(*(Panel(text, title=name) for name, text in document["paragraphs"].items()))
    console.print(side)
    if document["directory"] is not None:
        console.print(f"kept in {document['directory']}; try: qjax generate {document['directory']}/{_recipe(SHOWN).folder} "
                      "--prompt 'Once upon a time'", markup=False)  # fmt: skip
    console.print(f"[bold]{document['seconds']:.1f} s[/bold]")
    del Columns
