"""GPTQ against the answers of gptqmodel 7.7 (torch 2.15, damp .01).

`golden/gptq.npz` holds its codes (unsigned, zero points not yet taken off, columns in the original order), scales and
the group of each column for one synthetic layer, and the upper triangle of the Hessian 2/n sum x x^T of the 2048
activations.
`gptq_output_mse.json` is the mean over samples and outputs of the squared output error of each.
"""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import int3, int4, int8, quantize, uint4
from qjax.ptq.gptq_solver import GPTQOptions, solve

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@functools.cache
def golden():
    """The arrays, with the weight (256, 512) and the whole Hessian, and the output errors."""
    data = dict(np.load(GOLDEN / "gptq.npz"))
    k = data["w_out_in"].shape[1]
    hessian = np.zeros((k, k), np.float32)
    hessian[np.triu_indices(k)] = data.pop("hessian_upper")
    data["hessian"] = hessian + np.triu(hessian, 1).T
    return data, json.loads((GOLDEN / "gptq_output_mse.json").read_text())


def output_mse(w_hat):
    """Mean over samples and outputs of the squared output error: trace(D H D^T) / 2 / N."""
    data, _ = golden()
    d, hessian = np.float64(w_hat) - np.float64(data["w_out_in"]), np.float64(data["hessian"])
    return float(np.einsum("nk,kl,nl->", d, hessian, d, optimize=True)) / 2 / len(d)


def decoded(s):
    """The weights of a solution in the original order."""
    scale = np.asarray(s.scale)
    group = s.codes.shape[1] // scale.shape[1]
    zero_point = 0 if s.zero_point is None else np.repeat(s.zero_point, group, axis=1)
    w_hat = (np.asarray(s.codes) - zero_point) * np.repeat(scale, group, axis=1)
    return w_hat if s.perm is None else w_hat[:, np.argsort(s.perm)]


CASES = {
    "w4_g128": (int4(group_size=128), GPTQOptions()),
    "w4_g128_actorder": (int4(group_size=128), GPTQOptions(act_order=True)),
    "w4_g128_actorder_static": (int4(group_size=128), GPTQOptions(act_order=True, static_groups=True)),
    "w4_g128_groupaware": (int4(group_size=128), GPTQOptions(group_aware=True)),
    "w4_g128_asym": (uint4(group_size=128), GPTQOptions()),
    "w3_g128": (int3(group_size=128), GPTQOptions()),
    "w8_channel": (int8(), GPTQOptions()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_golden_data_is_what_it_says(case):
    data, mse = golden()
    scale, zero, g_idx = (data[f"{case}_{part}"] for part in ("scale", "zero", "g_idx"))
    assert output_mse((data[f"{case}_codes"] - np.float64(zero[:, g_idx])) * scale[:, g_idx]) == pytest.approx(mse[case], rel=1e-5)


def test_rounding_has_the_error_of_the_golden_rounding():
    data, mse = golden()
    rounded = quantize(data["w_out_in"], int4(group_size=128), (-1,)).dequantize()
    assert output_mse(rounded) == pytest.approx(mse["w4_g128_rounding"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    data, mse = golden()
    (spec, options), w = CASES[case], data["w_out_in"]
    s = solve(jnp.asarray(w), jnp.asarray(data["hessian"]), spec, options)
    codes = np.asarray(s.codes) + (0 if s.zero_point is not None else 2 ** (spec.bits - 1))
    if options.act_order and not options.static_groups:
        perm = np.asarray(s.perm)
        np.testing.assert_array_equal(data[f"{case}_g_idx"][perm], np.arange(512) // 128)
        codes = codes[:, np.argsort(perm)]
    else:
        assert s.perm is None
    assert np.mean(codes == data[f"{case}_codes"]) >= 0.9998
    assert np.mean(np.isclose(s.scale, data[f"{case}_scale"], rtol=1e-4, atol=0)) >= 0.999
    if s.zero_point is not None:
        assert np.mean(s.zero_point == data[f"{case}_zero"]) >= 0.99
    found = output_mse(decoded(s))
    assert found <= 1.01 * mse[case]
    assert found < output_mse(quantize(w, spec, (-1,)).dequantize())
    assert float(s.loss) == pytest.approx(found * 2 * len(w), rel=1e-3)
    assert (s.retries, s.dead) == (0, 0) and s.damping_used == np.float32(0.01)


def test_range_search_beats_the_golden_whole_range():
    data, mse = golden()
    options = GPTQOptions(mse=True)
    s = solve(jnp.asarray(data["w_out_in"]), jnp.asarray(data["hessian"]), int3(group_size=128), options)
    assert output_mse(decoded(s)) < mse["w3_g128"]
