"""The tiles that are timed on an H200 exist: a search stops at none that cannot be launched."""

import pathlib
import sys

import pytest
from qjax_kernels.gpu.tiles import SHARED_BYTES, Tiles

sys.path.append(str(pathlib.Path(__file__).parents[2] / "experiments" / "kernels"))

from h200_programs import Job
from h200_tiles import candidates, chosen, spread_out


def test_those_chosen_beforehand_fit():
    found = [tiles for by_rows in chosen().values() for each in by_rows.values() for tiles in each]
    assert len(found) > 20
    assert all(tiles.shared_bytes(4) <= SHARED_BYTES for tiles in found if isinstance(tiles, Tiles))


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W8A8", "FP8"])
@pytest.mark.parametrize("m", [1, 16, 64, 512])
def test_those_searched_are_many_and_different(name, m):
    found = candidates(name, m, 4096, 4096)
    assert len(found) >= 4 and len(set(found)) == len(found)
    assert spread_out(found, 3)[0] == Job(name, m, 4096, 4096).chosen()  # a search tries what is shipped
