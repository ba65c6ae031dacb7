"""Every program keeps its float function when everything that can be folded, equalized and rotated is, one after the other."""

import jax
import pytest

from qjax.graph import equalize, fold_batch_norm, rotate, verify
from qjax.program import trace
from tests.graph.programs import EXAMPLES
from tests.graph.streams import STREAMS, TOKENS

FAMILIES = [(e.name, e.fn, e.params, e.inputs) for e in EXAMPLES] + [(s.name, s.fn, s.params, (TOKENS,)) for s in STREAMS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fn", "params", "inputs"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_the_float_function_stays(name, fn, params, inputs):
    program, leaves, data = trace(fn, params, *inputs), jax.tree.leaves(params), jax.tree.leaves(inputs)
    folded = fold_batch_norm(program, leaves, data)
    equalized = equalize(program, folded.params, data)
    rotated = rotate(program, equalized.params, data, jax.random.key(0), every=True)
    assert not any("was not rotated" in reason for _, reason in rotated.refused), rotated.refused
    assert verify(program, leaves, rotated.params, data) < 7.7e-6
    assert bool(folded.folded) == (name == "conv_net")
    assert len(rotated.rotations) >= (name in {stream.name for stream in STREAMS})
