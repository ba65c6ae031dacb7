"""The tiles that are timed on an H200 exist: a search stops at none that cannot be launched."""

import json
import pathlib
import sys

import pytest
from qjax_kernels.gpu.tiles import SHARED_BYTES, Tiles

sys.path.append(str(pathlib.Path(__file__).parents[2] / "experiments" / "kernels"))

from h200 import fastest
from h200_programs import Job
from h200_tiles import _sizes, candidates, cases, chosen, meeting

FOUND = pathlib.Path(__file__).parents[2] / "experiments" / "kernels" / "h200"


def test_those_chosen_beforehand_fit():
    found = [tiles for by_rows in chosen().values() for each in by_rows.values() for tiles in each]
    assert len(found) > 20
    assert all(tiles.shared_bytes(4) <= SHARED_BYTES for tiles in found if isinstance(tiles, Tiles))


def test_those_of_the_cases_and_of_the_stress_fit():
    found = [(kind, tiles) for kind, _, _, _, _, tiles in cases(False)] + [(job.kind, job.chosen()) for job in meeting(False)]
    sized = [(tiles, _sizes(kind)) for kind, tiles in found]
    assert len(found) > 70
    assert all(tiles.shared_bytes(*sizes) <= SHARED_BYTES for tiles, sizes in sized if isinstance(tiles, Tiles))


@pytest.mark.parametrize("name", ["W4A16", "W4A16 f32", "W8A16", "W8A8", "FP8"])
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_those_searched_are_many_and_different(name, m):
    found = candidates(name, m, 4096, 4096)
    assert len(found) >= 4 and len(set(found)) == len(found)
    assert found[0] == Job(name, m, 4096, 4096).chosen()  # a search tries what is shipped


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W8A8"])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_the_first_of_them_are_of_every_kind(name, m):
    def kind(tiles):
        return (type(tiles), *((tiles.digits, tiles.warpgroups > 1, tiles.x_left) if isinstance(tiles, Tiles) else (tiles.wide,)))

    found = candidates(name, m, 8192, 8192)
    assert {kind(tiles) for tiles in found[:12]} == {kind(tiles) for tiles in found}


def searched() -> dict[str, list[dict]]:
    """What was timed on the device, beside each other in each of these lists."""
    files = ("fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "twentieth")
    records = {file: json.loads((FOUND / f"{file}.json").read_text()) for file in files}
    found = {file: record["search"] for file, record in records.items()}
    return found | {part: [row for row in records["seventeenth"][part] if row["name"] != "bf16"] for part in ("beside", "turns")}


def test_the_rules_choose_tiles_that_a_search_found_fast():
    """Between two searches a program took up to 7 % longer or shorter."""
    found, timed = {}, set()
    turns = json.loads((FOUND / "twentieth.json").read_text())["turns"]
    for file, rows in (searched() | {"turns of the twentieth": turns}).items():
        for row in rows:
            if "device us" in row:
                found.setdefault((file, row["name"], row["m"], row["k"], row["n"]), []).append(row)
    for (_, name, m, k, n), rows in found.items():
        chosen = Job(name, m, k, n).row()["tiles"]
        taken = [row["device us"] for row in rows if row["tiles"] == chosen]
        if taken:
            assert taken[0] <= 1.07 * min(row["device us"] for row in rows), (name, m, k, n, chosen)
            timed.add((name, m, k, n))
    assert len(found) > 60 and timed == {key[1:] for key in found}


def test_the_tuning_table_is_the_fastest_of_what_was_searched():
    rows = [row for found in searched().values() for row in found]
    failed = {"name": "W8A8", "m": 1, "k": 4096, "n": 4096, "tiles": {}, "us": 0.1, "failed": "the trace"}
    assert json.loads((FOUND / "tiles.json").read_text()) == fastest([*rows, failed])
