"""`qjax calibrate`: which ranges a text gives, how far they can be trusted, and how far two texts disagree."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click

from qjax.cli.shared import (
    OBSERVERS,
    SHIPPED,
    Model,
    check_tokenizer,
    emit,
    json_option,
    observer_of,
    open_model,
    progress,
    window_length,
)

_TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("calibrate")
@click.argument("src")
@click.option("--data", type=_TEXT, help=f"A text file, a passage a line. {SHIPPED} has one of its own.")
@click.option("--compare", "pair", type=_TEXT, nargs=2, metavar="A B",
              help="Two text files: says at which inputs B disagrees with A by more than A with itself.")
@click.option("--observer", type=click.Choice(OBSERVERS), default="minmax", show_default=True, metavar="NAME",
              help="What chooses a range: " + ", ".join(OBSERVERS) + ".")
@click.option("--percentile", type=click.FloatRange(0, 100, min_open=True),
              help="percentile: percent of the values that the range holds.  [default: 99.999]")
@click.option("--bits", type=click.IntRange(2, 8), default=8, show_default=True, help="Of the integers that the ranges are for.")
@click.option("--asymmetric", is_flag=True, help="Integers with a zero point: both ends by themselves.")
@click.option("--only", "where", default="*", show_default=True, metavar="PATTERN", help="A glob over parameter paths.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows of text at most.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window.  [default: the context, at most 2048]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows at a time.  [default: 8, or half of a text that has fewer than 16]")
@click.option("--every", is_flag=True, help="A row an input, not one for those that differ only in their layer, and what has not shifted.")
@json_option
def command(src: str, data: Path | None, pair: tuple[Path, Path] | None, every: bool, as_json: bool, **options: Any) -> None:
    """Shows what the weights of SRC, a float or packed model, meet when it reads a text.

    For every input: the range that the observer chooses, the share of values outside of it, how far the range moved and
    how many values lie elsewhere from the first half of the text to the second. With --compare: the same share between
    two texts, against that between the halves of A, the most different input first. Activations stay float.

    The text becomes windows as in `qjax quantize`.
    """
    if pair and data is not None:
        raise click.UsageError("--data and --compare exclude each other: give one")
    if options["percentile"] is not None and options["observer"] != "percentile":
        raise click.UsageError(f"--percentile goes with --observer percentile, and the observer is {options['observer']}")
    started = time.perf_counter()
    model = open_model(src)
    paths = pair or (_own_text(src) if data is None else data,)
    check_tokenizer(model)
    texts = [_windows(model, path, options) for path in paths]
    with progress() as begin:
        found = [_calibrate(model, rows, options, begin(f"reading {text['file']}")) for rows, text in texts]
    about = {"model": src, "observer": options["observer"], "bits": options["bits"]}
    about |= {"text": texts[0][1]} if not pair else {"a": texts[0][1], "b": texts[1][1]}
    result = _compare(*found) if pair else found[0]
    document = about | json.loads(result.to_json()) | {"seconds": round(time.perf_counter() - started, 3)}
    emit(document) if as_json else _show(document, result, every, [text for _, text in texts])


def _own_text(src: str) -> Path:
    if src != SHIPPED:
        raise click.UsageError("give --data FILE, a text like that of the model's use, a passage a line; or --compare A B")
    from qjax.models import books_llama_folder

    return books_llama_folder() / "calibration.txt"


def _windows(model: Model, path: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from qjax.cli.quantize import text_windows

    return text_windows(model, path, options["samples"], window_length(model, options["window"]))


def _calibrate(model: Model, rows: Any, options: dict[str, Any], advance: Any) -> Any:
    import qjax
    from qjax.cli.quantize import batches_of
    from qjax.core import integer

    observer = observer_of(options["observer"], options["percentile"])
    symmetric = not options["asymmetric"]
    spec = integer(options["bits"], signed=symmetric, symmetric=symmetric)
    batches = batches_of(rows, options["batch_size"] or max(1, min(8, len(rows) // 2)))  # two halves, where there can be
    return qjax.calibrate(model.apply, model.params, batches, options["where"], observer=observer, spec=spec, progress=advance)


def _compare(a: Any, b: Any) -> Any:
    import qjax

    found = qjax.compare(a, b)
    if a.batches > 1:
        return found
    note = "A gives one batch, whose halves cannot be compared; nothing is judged: give a longer A, or smaller --batch-size or --window"
    return dataclasses.replace(found, notes=(note,))


def _show(document: dict[str, Any], result: Any, every: bool, texts: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from qjax.cli.tables import calibration_table, comparison_table

    console = Console(highlight=False)
    for part in comparison_table(result, every) if len(texts) == 2 else calibration_table(result, every):
        console.print(part)
    for text in texts:
        console.print(f"{text['windows']} windows of {text['window']} tokens from {text['lines']} lines of {text['file']}")
    console.print(f"{document['observer']} for {document['bits']} bits, {document['seconds']:.1f} s")
