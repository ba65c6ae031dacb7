"""Every TPU kernel compiled for four generations on a machine without one, and its bundles held against the committed count."""

import importlib.metadata
import importlib.util
import json
import pathlib

import pytest

COMMITTED = pathlib.Path(__file__).parents[3] / "experiments" / "kernels" / "tpu_static"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[aot]'"),
]


@pytest.fixture(scope="module")
def rows(rows_of):
    """(chip, tile, kernel) -> row."""
    return {key(row): row for row in rows_of("tpu_static.py")}


def key(row):
    return row["chip"], tuple(row["tile"] or ()), row["kernel"]


def ratio(rows, chip, tile, kernel, count="body"):
    return rows[chip, tile, kernel][count] / rows[chip, tile, "bf16"][count]


def test_no_float_weight_is_written_to_memory(rows):
    assert len(rows) > 100
    for row in rows.values():
        assert row["temporaries"] < row["float_weight"], row


def test_bundles_are_those_committed(rows):
    version = importlib.metadata.version("libtpu")
    committed = COMMITTED / f"{version}.json"
    if not committed.exists():
        pytest.skip(f"no counts of libtpu {version} are committed: its compiler schedules otherwise")
    then = {key(row): row for row in json.loads(committed.read_text())}
    assert then.keys() == rows.keys(), "other kernels or tiles: run experiments/kernels/tpu_static.py --write"
    changed = [
        f"{name} {count}: {then[name][count]} -> {row[count]}"
        for name, row in rows.items()
        for count in ("body", "total", "temporaries")
        if abs(row[count] - then[name][count]) > 0.05 * then[name][count]
    ]
    assert not changed, "\n".join(changed)


def test_group_wise_int4_costs_no_more_than_bfloat16(rows):
    assert ratio(rows, "v6e", (128, 512, 512), "W4A16 g128") <= 1.02
    assert ratio(rows, "v6e", (256, 1024, 1024), "W4A16 g128") <= 1.0
    for chip in ("v5e", "v5p", "v6e", "tpu7x"):
        assert ratio(rows, chip, (16, 1024, 1024), "W4A16 g128") <= 1.0


def test_int8_products_cost_little_more_than_half(rows):
    assert ratio(rows, "v6e", (256, 1024, 1024), "W8A8") <= 0.65
    assert ratio(rows, "v5e", (16, 1024, 1024), "W8A8") <= 0.55


@pytest.mark.parametrize("kernel", ["W4A16 g128", "W8A16 g128", "W4A16 column", "W8A8", "W4A8", "W4A8 g128"])
def test_decode_waits_for_memory(rows, kernel):
    found = [row for row in rows.values() if row["tile"] and tuple(row["tile"]) == (16, 1024, 1024) and row["kernel"] == kernel]
    assert len(found) >= 3  # tpu7x has no integer unit
    for row in found:
        assert row["body"] <= row["dma"], row
        assert row["chip"] != "v5e" or row["total"] <= row["dma"], row
