"""The Hopper kernels compiled for an H200 on a machine without one: nothing is spilled, and instructions are those committed."""

import importlib.util
import json
import pathlib

import jax
import pytest
from qjax_kernels.gpu.tiles import SHARED_BYTES

COMMITTED = pathlib.Path(__file__).parents[3] / "experiments" / "kernels" / "gpu_static"
missing = [name for name in ("jax_cuda13_plugin", "absl") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{missing} are not installed: pip install -e '.[aot]'"),
]


@pytest.fixture(scope="module")
def rows(rows_of):
    return rows_of("gpu_static.py")


def test_next_to_nothing_is_spilled_and_shared_memory_suffices(rows):
    assert len(rows) > 10
    for row in ours(rows):
        # The widest blocks leave no room: what is known of a piece is put aside, with four bits some of it within the loop. How much
        # it is, is chance: of six ways to wait for 64 bits in place of 32, all cost 80 to 190 bytes more.
        blocks = row["tiles"].split(" ")[0] if "warpgroups" in row["tiles"] else ""
        four = row["kernel"].startswith("W4")
        allowed = {"128x256x128": 672 if four else 256, "64x256x128": 0 if four else 352, "128x192x128": 0 if four else 40}.get(blocks, 0)
        # Five to eight rows of long K: turns of four pieces, whose codes fill half of the registers of 16 warps.
        allowed = 96 if "4 pieces" in row["tiles"] and row["tiles"].endswith("wide") else allowed
        assert row["spills"] <= allowed and row["registers"] <= 255, row
        assert row["shared"] <= SHARED_BYTES and (row["products"] > 0 or row["kernel"].startswith("rows")), row


def test_no_operand_is_overwritten_while_tensor_cores_read_it(rows):
    for row in ours(rows):
        assert row["overwritten"] == 0, row
    assert sum(row["operands"] > 100 for row in ours(rows)) >= 4  # several parts under way


def test_no_float_weight_is_written_to_memory(rows):
    for row in ours(rows):
        if row["float_weight"]:
            assert row["temporaries"] - handed_over(row) < row["float_weight"] // 8, row
    # The tiles that were asked for write nothing but sums that one block hands to another.
    named = [row for row in rows if row["tiles"].startswith(("16x128x256 stages 3", "64x128x128", "128x128x128")) and row["m"] <= 128]
    assert [row["m"] for row in named] == [16, 64, 128, 128, 16] and all(row["temporaries"] <= handed_over(row) for row in named)


def handed_over(row) -> int:
    """Bytes of the float32 sums of 132 thread blocks that stay, and of the signs that they are there."""
    if "warpgroups" not in row["tiles"]:
        return 0
    block_m, block_n = (int(size) for size in row["tiles"].split(" ")[0].split("x")[:2])
    return 132 * (block_m * block_n * 4 + 16)


def test_an_a100_never_holds_the_float_weight(rows):
    few, more, many = (row for row in rows if row["kernel"].endswith("A100"))
    assert few["temporaries"] < few["float_weight"] // 32 and more["temporaries"] < more["float_weight"] // 3
    assert many["temporaries"] < many["float_weight"]


def test_instructions_are_those_committed(rows):
    committed = COMMITTED / f"{jax.__version__}.json"
    if not committed.exists():
        pytest.skip(f"no counts of jax {jax.__version__} are committed: its compiler schedules otherwise")
    then = {key(row): row for row in json.loads(committed.read_text())}
    assert list(then) == [key(row) for row in rows]
    changed = [
        f"{key(row)} {count}: {then[key(row)][count]} -> {row[count]}"
        for row in rows
        for count in ("loop", "total", "registers", "products", "shared", "temporaries")
        if abs(row[count] - then[key(row)][count]) > 0.05 * then[key(row)][count]
    ]
    assert not changed, "\n".join(changed)


def ours(rows):
    return [row for row in rows if not row["kernel"].endswith("A100")]


def key(row):
    return row["kernel"], row["m"], row["n"], row["k"], row["tiles"]
