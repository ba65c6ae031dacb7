"""The layout is a promise: checkpoints that older versions wrote are read to the bit, for ever."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats.checkpoint import fingerprint, read_document

GOLDEN = Path(__file__).parents[1] / "golden"
V1 = GOLDEN / "checkpoint_v1"


@pytest.fixture(name="maker", scope="module")
def maker_of_v1():
    spec = importlib.util.spec_from_file_location("make_checkpoint_v1", GOLDEN / "make_checkpoint_v1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_v1_packed_leaves_are_what_numpy_computed(maker):
    packed = qjax.load(V1 / "checkpoint").params["params"]["packed"]
    with np.load(V1 / "expected.npz") as expected:
        assert {key.split(".")[0] for key in expected} == set(packed)
        for name, q in packed.items():
            value = jnp.asarray(expected[f"{name}.value"]).astype(q.dtype)
            assert np.array_equal(q.dequantize(), value), name
            codes = np.asarray(q.codes)
            wanted = expected[f"{name}.codes"]
            assert codes.view(np.uint8).tobytes() == wanted.tobytes(), name
            if q.scale is not None:
                assert np.asarray(q.scale).tobytes() == expected[f"{name}.scale"].tobytes(), name
            if q.perm is not None:
                assert np.array_equal(q.perm, expected[f"{name}.perm"])
    for name, (spec, kept, sizes, axes, _, dtype, permuted) in maker.CASES.items():
        q = packed[name]
        assert (q.spec, q.axes, q.sizes, q.dtype.name, q.perm is not None) == (spec, axes, sizes, dtype, permuted)
        assert q.size == np.prod(kept) * np.prod(sizes)


def test_v1_trees_arrays_and_values_come_back(maker):
    params = qjax.load(V1 / "checkpoint").params
    assert list(params) == ["params", "arrays", "tuple", "values", "keys"]
    assert list(params["params"]) == ["packed", 3]
    assert jax.random.key_data(params["keys"]).tolist() == [0, 7] and params["keys"].dtype == jax.random.key(7).dtype
    for name, array in maker.arrays().items():
        found = np.asarray(params["arrays"][name])
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    assert params["values"] == maker.tree_of({})["values"]
    assert isinstance(params["tuple"], tuple) and params["tuple"][1] == [None, ()]


def test_v1_report_policy_and_metadata_come_back(maker):
    result = qjax.load(V1 / "checkpoint")
    assert result.report == maker.report()
    assert result.policy == maker.policy()
    assert result.metadata == maker.METADATA
    document = read_document(V1 / "checkpoint")
    assert (document.source.sha256, document.source.of) == ("12" * 32, "float parameters")
    assert document.written_by["qjax"] == "0.1.0"


def test_v1_saved_again_is_the_same(tmp_path):
    result = qjax.load(V1 / "checkpoint")
    qjax.save(tmp_path, result)
    again, before = read_document(tmp_path), read_document(V1 / "checkpoint")
    assert (again.arrays, again.leaves, again.tree) == (before.arrays, before.leaves, before.tree)
    assert fingerprint(qjax.load(tmp_path).params) == fingerprint(result.params)
