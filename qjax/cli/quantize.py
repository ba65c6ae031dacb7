"""`qjax quantize`: a float checkpoint becomes a packed one."""

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from qjax.cli.recipe import FIXED, LEARNED, METHODS, NO_DATA, TABLES, WEIGHTS, check_options, method_of, needs_data, spec_of
from qjax.cli.shared import (
    OBSERVERS,
    SHIPPED,
    Model,
    Update,
    check_tokenizer,
    describe_model,
    emit,
    in_options,
    json_option,
    observer_of,
    open_model,
    packed_bytes,
    progress,
    read_text,
    window_length,
)


@click.command("quantize")
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--weight", type=click.Choice(WEIGHTS), default="int4", show_default=True, metavar="SPEC",
              help="int2 .. int8 (symmetric), uint2 .. uint8 (asymmetric), bf16, fp16, or one of "
                   + ", ".join(["ternary", "binary", *TABLES, *LEARNED, "fp8_e4m3", "fp8_e5m2", *FIXED]) + ".")
@click.option("--group-size", type=click.IntRange(min=1), help="Values along the contracted axis that share a scale; 64 for nf4 and fp4.")
@click.option("--double-quant", is_flag=True, help="nf4, nf4_quantile, fp4 and binary: scales in 8 bits too.")
@click.option("--per", type=click.Choice(["tensor", "channel"]), help="A scale per tensor or channel instead (integers: channel).")
@click.option("--pad", is_flag=True, help="Pad with zeros what the group does not divide, instead of refusing it.")
@click.option("--method", type=click.Choice(METHODS), default="rtn", show_default=True,
              help="Round to nearest, GPTQ, GPTAQ, AutoRound, AWQ, HQQ (asymmetric weights), k-means (learned tables), "
                   "SmoothQuant (with --activation), or LLM.int8().")
@click.option("--activation", type=click.Choice(["dynamic", "static"]),
              help="Quantize activations to int8 too: a range for every row anew, or one from calibration.  [default: float]")
@click.option("--observer", type=click.Choice(OBSERVERS), metavar="NAME",
              help="--activation static: what chooses a range: " + ", ".join(OBSERVERS) + ".  [default: minmax]")
@click.option("--mse/--no-mse", default=None,
              help="Search the range of each group instead of taking its extremes.  [default: rtn does not, the others do]")
@click.option("--act-order", is_flag=True, help="gptq, gptaq: columns with the largest activations first.")
@click.option("--static-groups", is_flag=True, help="gptq, gptaq: ranges before rounding; with --act-order no permutation is stored.")
@click.option("--group-aware", is_flag=True, help="gptq, gptaq: that order, by groups and within them; no permutation is stored.")
@click.option("--refine", type=click.IntRange(min=0), default=0, help="gptq, gptaq: passes of coordinate descent afterwards.")
@click.option("--steps", type=click.IntRange(min=1), help="autoround: steps of gradient descent a block.  [default: 200]")
@click.option("--damping", type=float, help="gptq, gptaq: share of the mean diagonal that is added to it.  [default: 0.01]")
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help=f"All but rtn and hqq, and static activations: a text file, a passage a line. {SHIPPED} has one of its own.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Windows of calibration text at most.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens a window.  [default: the context, at most 2048]")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Windows at a time.")
@click.option("--keep", multiple=True, metavar="PATTERN",
              help="Leave these parameters float (a glob over paths, repeatable).  [default: '*embed*' and '*lm_head*']")
@click.option("--keep-none", is_flag=True, help="Quantize the embedding and the head too.")
@click.option("--overwrite", is_flag=True, help="Replace a packed checkpoint at DST.")
@click.option("--resume", is_flag=True,
              help="Keep what is finished in DST.resume while at work, go on from what is there; removed when DST is written.")
@click.option("--memory-limit", type=click.FloatRange(min=0), metavar="GB",
              help="Activations between layers that stay in memory; the rest goes to a temporary folder (TMPDIR).")
@click.option("--dry-run", is_flag=True, help="Say what it would make, need and take, and do nothing.")
@json_option
def command(src: str, dst: Path, as_json: bool, **options: Any) -> None:
    """Quantizes the float checkpoint SRC and writes the packed checkpoint DST.

    DST stands alone: it holds the weights, the model's config, the tokenizer, the policy and the report.

    A line of the calibration text that fills a window gives one, from its start; shorter lines are joined with those that
    follow until a window is full. Every passage begins with the model's start token. Blank lines do not count.
    """
    check_options(options)
    check_destination(dst, options["overwrite"])
    kept = _kept(dst, options)
    started = time.perf_counter()
    model = open_float(src)
    policy = make_policy(model, options)
    check_keeps(model, policy)
    rows, text = _calibration(model, options)
    batches = batches_of(rows, options["batch_size"])
    if options["dry_run"]:
        _price(model, policy, batches, text, as_json)
        return
    found = _pieces(kept)
    with progress() as begin, _saying_what_is_kept(kept):
        result = quantize_model(model, policy, batches, begin("quantizing"), kept, options["memory_limit"])
        metadata = {**describe_model(model), "calibration": text}
        save(dst, result, model, metadata, overwrite=options["overwrite"])
    if kept is not None:
        shutil.rmtree(kept)
    if found:
        click.echo(f"qjax: took over {found} finished pieces from `{kept}`", err=True)
    _warn_larger(result.report)
    document = describe_run(model, dst, result, metadata) | {"seconds": round(time.perf_counter() - started, 3)}
    emit(document) if as_json else _show(document, result, model)


def check_destination(dst: Path, overwrite: bool) -> None:
    """Refuses a destination before any work is done, not after."""
    from qjax.formats.checkpoint import DOCUMENT

    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"DST {str(dst)!r} is a file: give a folder")
    if dst.is_dir() and any(dst.iterdir()):
        foreign = sorted(path.name for path in dst.iterdir() if not path.name.startswith(("arrays.", DOCUMENT)))
        if foreign and not (dst / DOCUMENT).is_file():
            raise FileExistsError(f"DST {str(dst)!r} holds {foreign[0]!r}, and is no packed checkpoint: give a new folder")
        if (dst / DOCUMENT).is_file() and not overwrite:
            raise FileExistsError(f"DST {str(dst)!r} holds a packed checkpoint already: give a new folder, or --overwrite")
    parent = next(p for p in (dst.absolute(), *dst.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"DST {str(dst)!r} cannot be made, `{parent}` is not a folder one may write to: give another")


def _kept(dst: Path, options: dict[str, Any]) -> Path | None:
    """The folder of what is finished; refuses to begin anew beside one without being told."""
    folder = dst.with_name(f"{dst.name}.resume")
    if folder.exists() and not options["resume"] and not options["dry_run"]:
        raise FileExistsError(f"`{folder}` holds what an earlier run finished: give --resume to go on from it, or remove it")
    return folder if options["resume"] else None


def _pieces(kept: Path | None) -> int:
    """How many finished parameters, layers of them and inputs' scales a folder holds."""
    return 0 if kept is None or not kept.is_dir() else sum(path.name.startswith(("leaf.", "scales.")) for path in kept.iterdir())


@contextlib.contextmanager
def _saying_what_is_kept(kept: Path | None) -> Iterator[None]:
    """Where Ctrl-C ends the work, says what is left of it and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if not _pieces(kept):
            raise
        click.echo(err=True)  # ends the line of ^C
        raise click.Abort(f"{_pieces(kept)} finished pieces are kept in `{kept}`; repeat the command with --resume to go on") from None


def open_float(name: str) -> Model:
    """Opens a model that is to be quantized; refuses a packed one."""
    model = open_model(name)
    if model.document is not None:
        raise ValueError(f"SRC {name!r} is a packed checkpoint: quantize the float one that it was made from")
    return model


def make_policy(model: Model, options: dict[str, Any]) -> Any:
    """The policy that the options describe."""
    import qjax

    keep = list(options["keep"])
    if not keep and not options["keep_none"]:
        keep = ["*embed*"] if model.config.tie_word_embeddings else ["*embed*", "*lm_head*"]
    spec, method = spec_of(options), method_of(options)
    observer = None if options["observer"] is None else observer_of(options["observer"])
    static = qjax.static(qjax.int8(), observer=observer)
    activation = {None: None, "dynamic": qjax.dynamic(qjax.int8()), "static": static}[options["activation"]]
    rule = qjax.Rule("*", weight=spec, method=method, activation=activation)
    return qjax.Policy([*(qjax.Rule(pattern) for pattern in keep), rule])


def check_keeps(model: Model, policy: Any) -> None:
    """Refuses to keep everything: the last rule is that of what is quantized, those before it keep."""
    import jax
    import numpy as np

    import qjax

    *keeps, _ = policy.rules
    program = qjax.trace(model.apply, model.params, jax.ShapeDtypeStruct((1, 2), np.int32))
    paths = [leaf.path for leaf in program.leaves if leaf.sites]
    for keep in keeps:
        try:
            qjax.Policy([keep]).resolve(program)
        except ValueError as error:
            said = str(error).replace("rule `pattern` ", "--keep ")
            raise ValueError(said.replace("remove the rule or widen its pattern", "leave it out or widen it")) from error
    if all(any(keep.matches(path) for keep in keeps) for path in paths):
        patterns = ", ".join(repr(keep.pattern) for keep in keeps)
        raise ValueError(f"--keep {patterns} leaves nothing to quantize of {len(paths)} parameters, such as {paths[0]!r}: keep less")


def _calibration(model: Model, options: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The windows (shapes alone for a method that needs no data), and what they were made of."""
    import jax
    import numpy as np

    window = window_length(model, options["window"])
    if not needs_data(options):
        return jax.ShapeDtypeStruct((1, window), np.int32), None
    path = options["calibration"]
    if path is None and model.name == SHIPPED:
        from qjax.models import books_llama_folder

        path = books_llama_folder() / "calibration.txt"
    if path is None:
        which = f"--method {options['method']}" if options["method"] not in NO_DATA else f"--activation {options['activation']}"
        raise click.UsageError(f"{which} needs --calibration FILE, a text like that of the model's use, a passage a line")
    check_tokenizer(model)
    return text_windows(model, path, options["samples"], window, "--calibration ")


def text_windows(model: Model, path: Path, samples: int, window: int, option: str = "") -> tuple[Any, dict[str, Any]]:
    """Reads a text file as windows of tokens, and describes them; refuses one that is too short."""
    rows, used = calibration_rows(model, read_text(path).splitlines(), samples, window)
    if not len(rows):
        raise ValueError(f"{option}`{path}` holds less than one window of {window} tokens: give more text, or a smaller --window")
    return rows, {"file": Path(path).name, "windows": len(rows), "window": window, "lines": used}


def calibration_rows(model: Model, lines: Sequence[str], samples: int, window: int) -> tuple[Any, int]:
    """Cuts passages into windows: a line that fills one gives its start, shorter ones are joined until one is full.

    Args:
      model: whose tokenizer and start token are used.
      lines: the passages.
      samples: windows at most.
      window: tokens a window.

    Returns:
      (N, window) int32 with N from 0 to `samples`, and the number of lines that went in.
    """
    import numpy as np

    from qjax.evaluation import encode

    rows: list[Any] = []
    begun: list[int] = []
    used = begun_lines = 0
    for line in filter(str.strip, lines):
        if len(rows) == samples:
            break
        passage = [*model.start_ids, *encode(model.tokenizer, line).tolist()]
        if len(passage) >= window:
            rows.append(passage[:window])
            used += 1
            continue
        begun, begun_lines = begun + passage, begun_lines + 1
        if len(begun) >= window:
            rows.append(begun[:window])
            used += begun_lines
            begun, begun_lines = [], 0
    return np.asarray(rows, np.int32).reshape(-1, window), used


def batches_of(rows: Any, batch_size: int) -> list[Any]:
    """Batches of windows; shapes pass as one."""
    import numpy as np

    from qjax.evaluation import batches

    return list(batches(rows, batch_size)) if isinstance(rows, np.ndarray) else [rows]


def quantize_model(
    model: Model, policy: Any, batches: list[Any], update: Update, kept: Path | None = None, memory_limit: float | None = None
) -> Any:
    """Quantizes in float32 what the policy quantizes, and leaves the rest in the dtype in which it is stored.

    Args:
      model: a float model.
      policy: what becomes what.
      batches: windows, or shapes.
      update: is told how far it is.
      kept: a folder for what is finished, to go on from after a kill.
      memory_limit: GB of live values that stay in memory.

    Returns:
      The `Result`. Its report counts as bytes before those of the stored dtype, not of the float32 copy.
    """
    import jax
    import numpy as np

    import qjax
    from qjax.policy import path_str

    resolved = policy.resolve(qjax.trace(model.apply, model.params, jax.ShapeDtypeStruct(batches[0].shape, np.int32)))
    chosen = {choice.leaf.path for choice in resolved if choice.spec is not None}
    update(0, len(chosen))
    params = jax.tree_util.tree_map_with_path(
        lambda path, w: w if path_str(path) in chosen else w.astype(model.stored), model.params
    )
    spill = None if memory_limit is None else qjax.Spill(int(memory_limit * 1e9))
    result = qjax.quantize(model.apply, params, policy, batches, progress=update.show, resume=kept, spill=spill)
    update(len(chosen), len(chosen))
    return dataclasses.replace(result, report=_as_stored(result.report, model))


def _as_stored(report: Any, model: Model) -> Any:
    """The report with bytes before as stored, not as opened."""
    import numpy as np

    item = np.dtype(model.stored).itemsize

    def stored(row: Any) -> Any:
        before = math.prod(row.shape) * item
        return dataclasses.replace(row, float_nbytes=before, nbytes=row.nbytes if row.spec else before)

    return dataclasses.replace(report, rows=tuple(map(stored, report.rows)))


def _warn_larger(report: Any) -> None:
    """Says on stderr what takes no less room than before, for padding or small groups."""
    larger = [row for row in report.rows if row.spec and row.nbytes >= row.float_nbytes]
    if larger:
        more = f" and {len(larger) - 1} more" if len(larger) > 1 else ""
        click.echo(f"qjax: warning: `{larger[0].path}`{more} takes {larger[0].nbytes} bytes packed, no fewer than the "
                   f"{larger[0].float_nbytes} before: take a larger --group-size, or no --pad", err=True)  # fmt: skip


def _price(model: Model, policy: Any, batches: list[Any], text: Any, as_json: bool) -> None:
    """Prints what `qjax.plan` says."""
    from rich.console import Console

    import qjax
    from qjax.cli.tables import describe_rows, report_table

    plan = qjax.plan(model.apply, model.params, policy, batches)
    plan = dataclasses.replace(plan, report=_as_stored(plan.report, model), problems=tuple(map(in_options, plan.problems)))
    _warn_larger(plan.report)
    if as_json:
        numbers = ("problems", "batches", "rows", "passes", "statistics", "live", "working", "peak", "programs", "seconds")
        emit({"source": model.name, **describe_rows(plan.report), "calibration": text, "dry_run": True,
              "plan": {name: getattr(plan, name) for name in numbers} | plan.work._asdict()})  # fmt: skip
    else:
        console = Console(highlight=False)
        lines, refused = plan.lines(), len(plan.problems)
        for part in [*lines[:refused], *report_table(plan.report), *lines[refused:], "nothing was written"]:
            console.print(part, markup=not isinstance(part, str))
    if plan.problems:
        click.get_current_context().exit(1)


def save(dst: Path, result: Any, model: Model, metadata: dict[str, Any], overwrite: bool) -> None:
    """Writes the packed checkpoint; leaves no folder behind when that fails."""
    import qjax
    from qjax.formats.checkpoint import fingerprint

    with _removed_if_new(dst):
        qjax.save(dst, result, metadata=metadata, overwrite=overwrite, source_sha256=fingerprint(model.params))


@contextlib.contextmanager
def _removed_if_new(dst: Path) -> Iterator[None]:
    new = [folder for folder in (dst, *dst.parents) if not folder.exists()]
    try:
        yield
    except BaseException:  # Ctrl-C too; it goes on
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def describe_run(model: Model, dst: Path, result: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """What `--json` says of a run."""
    from qjax.cli.tables import describe_rows

    return {
        "source": model.name,
        "destination": str(dst),
        **describe_rows(result.report),
        "policy": [repr(rule) for rule in result.policy.rules],
        "calibration": metadata.get("calibration"),
        "disk_bytes": packed_bytes(dst, metadata),
        "float_disk_bytes": model.disk_bytes,
    }


def _show(document: dict[str, Any], result: Any, model: Model) -> None:
    from rich.console import Console

    from qjax.cli.tables import report_table
    from qjax.report import format_bytes

    console = Console(highlight=False)
    for part in report_table(result.report):
        console.print(part)
    text = document["calibration"]
    if text is not None:
        console.print(f"calibration: {text['windows']} windows of {text['window']} tokens from {text['lines']} lines of {text['file']}")
    console.print(f"on disk: {format_bytes(model.disk_bytes)} -> {format_bytes(document['disk_bytes'])}")
    console.print(f"saved {document['destination']} after {document['seconds']:.1f} s")
