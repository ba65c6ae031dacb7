"""Every program keeps its float function when everything that can be folded, equalized and rotated is, one after the other."""

import jax
import numpy as np
import pytest

import qjax
from qjax.graph import equalize, fold_batch_norm, rotate, verify
from qjax.program import trace
from tests.families.families import NAMES, family
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "bf16" not in name])
def test_the_float_function_of_a_module_stays(name):
    """The same on Flax's own modules, Linen and NNX; and for every weight that multiplies it is said what was done, or why not."""
    model = family(name)
    steps = [qjax.batch_norm_folding(), qjax.equalization(), qjax.rotation(jax.random.key(0), every=True)]
    result = qjax.rewrite(model.fn, model.params, model.data, steps)
    assert result.error < 7.7e-6
    run = jax.jit(model.fn)
    for data in model.data:
        got, want = (np.asarray(run(params, *data), np.float64) for params in (result.params, model.params))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    said = {(change.step, change.path) for change in result.changes}
    weights = {site.path for site in qjax.trace(model.fn, model.params, *model.data[0]).sites if site.op != "gather"}
    for step in steps[1:]:
        assert not {path for path in weights if (step.name, path) not in said}, step.name
    done = {change.step for change in result.changes if change.done}
    assert ("batch_norm_folding" in done) == ("residual" in name)
    assert all(change.text for change in result.changes)
