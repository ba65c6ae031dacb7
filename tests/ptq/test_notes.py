"""Remarks on the layers of a stack: the range of what was measured, with its signs."""

import pytest

from qjax.ptq.notes import merged


@pytest.mark.parametrize(
    ("texts", "want"),
    [
        (("bias -0.5", "bias -0.25"), "bias -0.5 .. -0.25 (layers 0-1)"),
        (("bias 0.5", "bias -0.25"), "bias -0.25 .. 0.5 (layers 0-1)"),
        (("gain (-1e-3)", "gain (2.5e-2)"), "gain (-1e-3 .. 2.5e-2) (layers 0-1)"),
        (("from 0.25-0.5", "from 0.125-1.0"), "from 0.125 .. 0.25-0.5 .. 1.0 (layers 0-1)"),  # a dash is no sign
    ],
)
def test_a_range_goes_from_the_least_to_the_most(texts, want):
    assert merged({(i,): [text] for i, text in enumerate(texts)}) == (want,)
