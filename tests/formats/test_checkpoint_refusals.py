"""What a checkpoint does not hold, and paths that a save does not touch: refused by name, with nothing left behind."""

import contextlib
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import LearnedSpec, assemble, quantize
from qjax.formats.placement import check_packed


def weight(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


# What cannot be stored.


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (jax.ShapeDtypeStruct((2,), jnp.float32), TypeError, "`a/0` is a ShapeDtypeStruct"),
        (jnp.tanh, TypeError, "`a/0` is a "),
        (1j, TypeError, "`a/0` is a complex"),
        (b"bytes", TypeError, "`a/0` is a bytes"),
        (np.array(["text"]), TypeError, "`a/0` is an array of <U4"),
        (np.array([None]), TypeError, "`a/0` is an array of object"),
        ({1.5: 2}, TypeError, "`a/0` of the tree has the key 1.5"),
        ({(1, 2): 2}, TypeError, r"`a/0` of the tree has the key \(1, 2\)"),
    ],
)
def test_a_leaf_that_cannot_be_stored_is_named(tmp_path, leaf, error, message):
    with pytest.raises(error, match=message):
        qjax.save(tmp_path / "c", {"a": [leaf]})
    assert not (tmp_path / "c").exists()


def test_a_deleted_array_a_tracer_and_a_wrong_qtensor_are_named(tmp_path):
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match="`w` was deleted"):
        qjax.save(tmp_path, {"w": gone})
    with pytest.raises(TypeError, match="`w` is a tracer"):
        jax.make_jaxpr(lambda w: qjax.save(tmp_path, {"w": w}))(jnp.ones(2))
    q = quantize(weight(8, 4), qjax.int4(), axes=(0,))
    with pytest.raises(ValueError, match="`codes` of `w` must be uint8"):
        qjax.save(tmp_path, {"w": dataclasses.replace(q, codes=q.codes[:, :1])})


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ([1], TypeError, "`metadata` must be a dict"),
        ({"a": {1: 2}}, TypeError, r"`metadata\['a'\]` has the key 1"),
        ({"a": [float("nan")]}, ValueError, r"`metadata\['a'\]\[0\]` is nan"),
        ({"a": np.ones(2)}, TypeError, r"`metadata\['a'\]` is a ndarray"),
    ],
)
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        qjax.save(tmp_path, {}, metadata=metadata)


# Paths.


def test_only_a_checkpoint_is_overwritten(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        qjax.load(tmp_path / "missing")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds what is not a checkpoint of qjax, 'thesis.tex'"):
        qjax.save(other, {})
    with pytest.raises(FileExistsError, match="is a file"):
        qjax.save(other / "thesis.tex", {})
    (other / "thesis.tex").rename(other / "qjax.json")
    with pytest.raises(FileExistsError, match="may be no checkpoint"):
        qjax.save(other, {})
    (other / "qjax.json").write_text('{"format": "something else"}')
    with pytest.raises(FileExistsError, match="may be no checkpoint"):
        qjax.save(other, {})
    assert os.listdir(other) == ["qjax.json"]


def test_overwriting_leaves_nothing_of_the_old_one_and_all_that_is_not_ours(tmp_path):
    qjax.save(tmp_path, {"w": jnp.ones(3)})
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qjax.save(tmp_path, {"w": jnp.zeros(3)})
    qjax.save(tmp_path, {"w": jnp.zeros(3)}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "arrays.2", "qjax.json"]
    assert qjax.load(tmp_path).params["w"].tolist() == [0, 0, 0]
    qjax.save(tmp_path, {"n": 1}, overwrite=True)  # no array, no folder
    assert sorted(os.listdir(tmp_path)) == ["README.md", "qjax.json"]


def test_an_address_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (lambda path: qjax.save(path, {}), qjax.load):
        with pytest.raises(ValueError, match="'gs://bucket/c' is not a path of this machine"):
            use("gs://bucket/c")
    assert os.listdir(tmp_path) == []


def test_a_relative_path_is_meant_from_where_the_process_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qjax.save("c", {"w": jnp.ones(3)})
    assert qjax.load("c").params["w"].tolist() == qjax.load(tmp_path / "c").params["w"].tolist()


def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_rubbish(tmp_path):
    qjax.save(tmp_path, {"w": jnp.ones(3)})
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(
        TypeError, match="a object cannot be stored"
    ):  # fails when the document is written, after the arrays
        report = qjax.Report((), (object(),))  # pyright: ignore[reportArgumentType]
        qjax.save(tmp_path, qjax.Result({"w": jnp.zeros(3)}, report, qjax.Policy([qjax.Rule("*")])), overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert qjax.load(tmp_path).params["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("spec", [qjax.int4(group_size=4), qjax.int8(block=(2, 4)), qjax.learned(2, group_size=4)], ids=str)
def test_what_a_file_may_hold_is_what_can_be_assembled(spec):
    q = quantize(jnp.ones((8, 6)), spec, axes=(0,))
    check_packed(q, "w")
    for scale in (q.scale[:, :1], q.scale[:2], q.scale[:1]):
        shared = scale.shape == (1, 2) and not isinstance(spec, LearnedSpec)  # one for all rows
        wrong = contextlib.nullcontext() if shared else pytest.raises(ValueError, match=r"`scale` of `w` must .*\(")
        with wrong:
            check_packed(dataclasses.replace(q, scale=scale), "w")
        with wrong:
            assemble(q.codes_unpacked(), scale, None, spec, q.axes, q.sizes, q.dtype, levels=q.levels)
