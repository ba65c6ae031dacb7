"""What is read in assembly: registers that the tensor cores read while something else is written there."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[2] / "experiments" / "kernels"))

from sass import written_under_way

LOOP = """
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0020*/                   HMUL2.BF16_V2 R20, R8.H0_H0, R12 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R20, gdesc[UR8], R24, gsb0 ;
{between}
        /*0050*/                   HMUL2.BF16_V2 R{second}, R8.H0_H0, R12 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R{second}, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
"""
WAIT = "        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"


@pytest.mark.parametrize(
    ("between", "second", "left", "wrong"),
    [
        ("", 16, "0x0", 0),  # registers of its own, and nothing is left at the end
        ("", 20, "0x0", 2),  # the first product still reads them, in both rounds
        (WAIT, 20, "0x0", 0),
        (WAIT, 20, "0x1", 1),  # the end of the loop meets its beginning
        (WAIT, 16, "0x1", 0),
        ("", 21, "0x0", 2),  # one of four
    ],
)
def test_operands_are_left_alone_until_a_wait(between, second, left, wrong):
    products, offending = written_under_way(LOOP.format(between=between, second=second, left=left))
    assert products == 4 and len(offending) == wrong
    assert all(each.startswith(f"HMUL2.BF16_V2 R{second}") or "R20" in each for each in offending)


def test_what_writes_four_registers_or_none():
    text = LOOP.format(between="        /*0040*/                   LDSM.16.M88.4 R18, [R2] ;", second=16, left="0x0")
    assert len(written_under_way(text)[1]) == 2
    text = LOOP.format(between="        /*0040*/                   STS.64 [R20], R2 ;", second=16, left="0x0")
    assert not written_under_way(text)[1]
