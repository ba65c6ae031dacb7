"""`qjax eval`: perplexity, divergence from the float model, sizes, speed."""

import time
from pathlib import Path
from typing import Any

import click

from qjax.cli.shared import (
    SHIPPED,
    Model,
    check_tokenizer,
    emit,
    json_option,
    open_model,
    platform,
    progress,
    read_text,
    window_length,
)


@click.command("eval")
@click.argument("model", default=SHIPPED)
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A text file.  [default: the held-out text inside the package, a novel in English]")
@click.option("--against", metavar="MODEL", help="The float model: adds KL divergence, top-1 agreement, and the difference in loss.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window.  [default: the context, at most 2048]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N windows.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Windows at a time.")
@json_option
def command(model: str, text: Path | None, against: str | None, window: int | None, limit: int | None, batch_size: int,
            as_json: bool) -> None:  # fmt: skip
    """Measures MODEL (default: books-llama-4m) on a text.

    The tokens of the text, the model's start token before them, are cut into windows without overlap; an incomplete one at
    the end is dropped. Perplexity is exp(mean loss) over all predicted tokens; KL divergence is in nats a token.
    """
    from qjax.cli.measure import SPEED_NOTE, decode_speed, score, sizes
    from qjax.models import books_llama_folder

    started = time.perf_counter()
    opened = [open_model(name) for name in ([against] if against is not None else []) + [model]]
    rows = text_rows(opened[-1], text or books_llama_folder() / "heldout.txt", window)[:limit]
    if len(opened) == 2:
        _check_comparable(*opened)
    with progress() as begin:
        scores = score(opened, rows, batch_size, len(opened) == 2, begin("evaluating"))
        speeds = [decode_speed(each, rows[0]) for each in opened]
    measured = [
        {"model": each.name, **found.numbers, **sizes(each), "tokens_per_second": speed}
        for each, found, speed in zip(opened, scores, speeds, strict=True)
    ]
    document = {
        **measured[-1],
        "against": measured[0] if len(opened) == 2 else None,
        "loss_difference": _difference(scores) if len(opened) == 2 else None,
        "text": "the held-out text of the package" if text is None else str(text),
        "windows": len(rows),
        "window": rows.shape[1],
        "platform": platform(),
        "speed_note": SPEED_NOTE,
        "seconds": round(time.perf_counter() - started, 3),
    }
    emit(document) if as_json else _show(document)


def text_rows(model: Model, path: Path, window: int | None) -> Any:
    """(N, T) windows of a text file."""
    from qjax.evaluation import encode, windows

    check_tokenizer(model)
    length = window_length(model, window)
    ids = encode(model.tokenizer, read_text(path))
    if len(ids) + len(model.start_ids) < length:
        raise ValueError(f"--text `{path}` holds {len(ids)} tokens, less than one window of {length}: give more, or a smaller --window")
    return windows(ids, length, model.config.bos_token_id)


def _check_comparable(reference: Model, model: Model) -> None:
    if reference.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--against {reference.name!r} has {reference.config.vocab_size} tokens and {model.name!r} has "
                         f"{model.config.vocab_size}: give the float model that it was made from")  # fmt: skip


def _difference(scores: Any) -> dict[str, float] | None:
    """The difference in mean loss with its 95 % interval; None if one window does not tell."""
    from qjax.evaluation import paired_bootstrap

    reference, other = (found.losses for found in scores)
    if len(reference) < 2:
        return None
    interval = paired_bootstrap(reference, other)
    return {"nats": interval.difference, "low": interval.low, "high": interval.high, "confidence": interval.confidence}


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    rows = [document["against"], document] if document["against"] else [document]
    console.print(f"{document['windows']} windows of {document['window']} tokens, {document['text']}\n")
    console.print(score_table(rows, [row["model"] for row in rows]))
    difference = document["loss_difference"]
    console.print()
    if difference is not None:
        console.print(f"loss {difference['nats']:+.5f} nats a token against {document['against']['model']}, "
                      f"95 % interval {difference['low']:+.5f} .. {difference['high']:+.5f} (paired bootstrap over windows)")  # fmt: skip
    console.print(f"{document['speed_note']}; {document['platform']}", style="dim")


def score_table(rows: list[dict[str, Any]], names: list[str]) -> Any:
    """One row a model."""
    from rich import box
    from rich.table import Table

    from qjax.report import format_bytes

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for name in ("perplexity", "KL\nnats", "top-1\nagrees", "bits a\nweight", "on\ndisk", "in\nmemory", "tokens\n/ s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in zip(names, rows, strict=True):
        table.add_row(
            name,
            f"{row['perplexity']:.3f}",
            "" if row["kl"] is None else f"{row['kl']:.5f}",
            "" if row["top1_agreement"] is None else f"{row['top1_agreement'] * 100:.2f}%",
            f"{row['bits_per_weight']:.2f}",
            format_bytes(row["disk_bytes"]),
            format_bytes(row["memory_bytes"]),
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}",
        )
    return table
