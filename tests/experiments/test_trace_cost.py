"""The interpreted int8 program of a 32-layer model is the one that would be written by hand."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "trace_cost"


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import programs

    yield programs
    sys.modules.pop("programs", None)


@pytest.mark.slow
def test_same_instructions_as_by_hand(programs):
    params, tokens = programs.init(jax.random.key(0)), jnp.arange(24).reshape(2, 12)
    policy = qjax.Policy([qjax.Rule("embed", weight=None), qjax.Rule("*", weight=qjax.int8())])
    packed = qjax.quantize(programs.plain, params, policy, calibration=[tokens]).params
    interpreted = jax.jit(qjax.quantized(programs.plain)).lower(packed, tokens).compile()
    hand = jax.jit(programs.by_hand).lower(programs.codes_and_scales(packed), tokens).compile()
    assert programs.instructions(interpreted) == programs.instructions(hand)
    got, want = interpreted(packed, tokens), hand(programs.codes_and_scales(packed), tokens)
    np.testing.assert_array_equal(got, want)
