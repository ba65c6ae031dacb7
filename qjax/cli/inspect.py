"""`qjax inspect`: what a checkpoint holds."""

import math
from typing import Any

import click

from qjax.cli.shared import SHIPPED, emit, json_option, model_folder, open_model, packed_bytes


@click.command("inspect")
@click.argument("model", default=SHIPPED)
@click.option("--every", is_flag=True, help="A row for every parameter, not one for those that differ only in their layer.")
@json_option
def command(model: str, every: bool, as_json: bool) -> None:
    """Shows what MODEL (default: books-llama-4m) holds: parameters, sizes, errors, policy, versions.

    Of a packed checkpoint only its document is read. Of a float one: which parameters could be quantized, and why the others
    cannot.
    """
    from qjax.formats.checkpoint import DOCUMENT

    folder = model_folder(model)
    document, report = _packed(model) if (folder / DOCUMENT).is_file() else _float(model)
    emit(document) if as_json else _show(document, report, every)


def _packed(name: str) -> tuple[dict[str, Any], Any]:
    from qjax.cli.tables import describe_rows
    from qjax.formats.checkpoint import read_document
    from qjax.report import Report

    folder = model_folder(name)
    found = read_document(folder)
    report = Report(()) if found.report is None else found.report
    metadata = {key: value for key, value in found.metadata.items() if key != "tokenizer"}
    document = {
        "model": name,
        "kind": "packed",
        **describe_rows(report),
        "policy": [] if found.policy is None else [repr(rule) for rule in found.policy.rules],
        "written_by": found.written_by,
        "source": {"sha256": found.source.sha256, "of": found.source.of},
        "metadata": metadata,
        "tokenizer": found.metadata.get("tokenizer") is not None,
        "disk_bytes": packed_bytes(folder, found.metadata),
    }
    return document, report


def _float(name: str) -> tuple[dict[str, Any], Any]:
    import dataclasses

    import jax
    import numpy as np

    import qjax
    from qjax.cli.tables import describe_rows

    model = open_model(name)
    nothing = qjax.Policy([qjax.Rule("*")])
    report = qjax.sites(model.apply, nothing)(model.params, jax.ShapeDtypeStruct((1, 2), np.int32))
    item = np.dtype(model.stored).itemsize
    stored = {"dtype": np.dtype(model.stored).name, "bits_per_weight": item * 8}
    rows = tuple(
        dataclasses.replace(row, **stored, nbytes=math.prod(row.shape) * item, float_nbytes=math.prod(row.shape) * item,
                            reason="" if row.ops else row.reason)
        for row in report.rows
    )  # fmt: skip
    report = dataclasses.replace(report, rows=rows)
    document = {
        "model": name,
        "kind": "float",
        **describe_rows(report),
        "metadata": {"config": model.config.to_hf()},
        "tokenizer": model.tokenizer is not None,
        "disk_bytes": model.disk_bytes,
    }
    return document, report


def _show(document: dict[str, Any], report: Any, every: bool) -> None:
    from rich.console import Console

    from qjax.cli.tables import report_table
    from qjax.report import format_bytes

    console = Console(highlight=False)
    config = document["metadata"].get("config", {})
    console.print(f"{document['model']}: {document['kind']}, {format_bytes(document['disk_bytes'])} on disk, "
                  f"{'with' if document['tokenizer'] else 'without'} tokenizer")  # fmt: skip
    if config:
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
                 "max_position_embeddings")  # fmt: skip
        console.print("config: " + ", ".join(f"{name} {config[name]}" for name in names if name in config))
    for part in report_table(report, every):
        console.print(part)
    for rule in document.get("policy", ()):
        console.print(f"policy: {rule}", markup=False)
    text = document["metadata"].get("calibration")
    if text:
        console.print(f"calibration: {text['windows']} windows of {text['window']} tokens from {text['file']}")
    if "written_by" in document:
        console.print("written by: " + ", ".join(f"{name} {version}" for name, version in document["written_by"].items()))
        console.print(f"sha256 of the {document['source']['of']}: {document['source']['sha256']}")
