"""`qjax demo`: the whole way on the model inside the package, and the table that it leads to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from qjax.cli.shared import SHIPPED, Model, Update, emit, json_option, platform, progress

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
        rest = dict.fromkeys(("per", "damping", "mse", "activation", "observer", "steps", "refine"))
        rest |= dict.fromkeys(("pad", "double_quant", "act_order", "static_groups", "group_aware", "keep_none"), False)
        return {"weight": self.weight, "method": self.method, "group_size": self.group_size, "keep": (), **rest}


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
    with _working_folder(directory) as folder, progress() as begin:
        document = _run(folder, 32 if quick else None, Stages(begin))
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

    def __init__(self, begin: Callable[[str], Update]):
        self.begin, self.seconds = begin, {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[Update]:
        """Runs a stage; gives what to call with (done, all)."""
        started = time.perf_counter()
        yield self.begin(name)
        self.seconds[name] = round(time.perf_counter() - started, 3)


class Background:
    """One thread for work that keeps one core busy, such as compilation, while another core has other work.

    GPTQ must not run here while it runs elsewhere: its triangular solves, begun by two threads on a machine of two cores, wait
    in XLA's thread pool for each other, for ever.
    """

    def __init__(self):
        self.pool, self.futures = ThreadPoolExecutor(1), []

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Adds work."""
        self.futures.append(self.pool.submit(work, *arguments))

    def results(self) -> list[Any]:
        """Waits for all work; gives what it returned that is not None."""
        return [result for result in (future.result() for future in self.futures) if result is not None]


def _run(folder: Path, count: int | None, stages: Stages) -> dict[str, Any]:
    """All stages in turn; gives the document of `--json`."""
    from qjax.cli.measure import score, sizes

    with stages("loading") as update:
        model, rows, calibration = _inputs(count)
        update(1, 1)
    with Background() as later:
        models = {FLOAT: model} | _quantized(model, calibration, rows[:BATCH], folder, stages, later)
        with stages("compiling the rest") as update:
            second = later.results()[0]
            update(1, 1)
    with stages("measuring") as update:
        scores = score(list(models.values()), rows, BATCH, True, update)
    made = {}
    with stages("writing") as update:
        for name, each in models.items():
            made[name] = _generation(each, NEW_TOKENS)
            update(len(made), len(models))
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


def _quantized(
    model: Model, calibration: Any, tokens: Any, parent: Path, stages: Stages, later: Background
) -> dict[str, Model]:
    """The quantized models by name. Each is saved, and the programs that will be timed are compiled meanwhile."""
    import jax

    from qjax.cli.quantize import batches_of, describe_model, make_policy, quantize_model, save
    from qjax.cli.shared import packed_bytes, packed_model

    metadata, batches, made = describe_model(model), batches_of(calibration, 8), {}
    later(_compile, model, tokens)
    compiled = set()
    for recipe in RECIPES:
        folder = parent / recipe.folder
        with stages(f"quantizing {recipe.name}") as update:
            result = quantize_model(model, make_policy(model, recipe.options), batches, update)
            save(folder, result, model, metadata, overwrite=False)
        size = packed_bytes(folder, metadata)
        made[recipe.name] = packed_model(recipe.name, model.config, result.params, model.tokenizer, size)
        structure = jax.tree.structure(result.params)
        if structure not in compiled:
            compiled.add(structure)
            later(_compile, made[recipe.name], tokens)
        if recipe.name == SHOWN:
            later(_second_process, made[SHOWN], folder, tokens)
    return made


def _compile(model: Model, tokens: Any) -> None:
    """Runs what will be timed once, for its compilation."""
    model.forward(model.params, tokens)
    _generation(model, 2)


def _second_process(model: Model, folder: Path, tokens: Any) -> dict[str, Any]:
    """Compares the logits of a model with those that a new process of the same interpreter computes from the checkpoint."""
    from qjax.cli.digest import digest

    command = [sys.executable, "-m", "qjax.cli.digest", str(folder)]
    done = subprocess.run(command, input=json.dumps(tokens.tolist()), capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise OSError(f"the second process could not run {str(folder)!r}: {' '.join(done.stderr.split())[-500:]}")
    here, there = digest(model, tokens), json.loads(done.stdout)
    return {"identical": here["sha256"] == there["sha256"], "here": here, "there": there}


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
    console.print(f"\n[bold]{SHIPPED}[/bold] on {document['windows']} windows of {document['window']} tokens that it never saw "
                  f"(gptq: {document['calibration_windows']} windows of other text)\n")  # fmt: skip
    console.print(score_table(rows, [row["model"] for row in rows]))
    console.print(f"\n{document['speed_note']}; {document['platform']}\n", style="dim")
    verdict = "[bold green]bit-identical[/bold green]" if second["identical"] else "[bold red]DIFFERENT[/bold red]"
    console.print(f"second process, from the saved {SHOWN}: {second['there']['logits']:,} logits {verdict}")
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
