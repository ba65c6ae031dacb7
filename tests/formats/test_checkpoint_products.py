"""`result.sites` in checkpoints: kept to the bit, absent from older ones, and refused where it is damaged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.formats.document import digest
from tests.program.cases import normal

X = normal(6, 8)


def fn(p, x):
    def body(x, w):
        with jax.named_scope("mix"):
            return jnp.tanh(jax.nn.softmax(x @ w @ x.T) @ x), None

    return lax.scan(body, x, p["w"])[0] @ p["w"][0]


@pytest.fixture(name="result", scope="module")
def quantized_once():
    rules = [
        qjax.Rule("*", weight=qjax.int8()),
        qjax.Rule("*:dot_general.0", activation=qjax.dynamic(qjax.int8())),
        qjax.Rule("*:dot_general.1", activation=(qjax.static(qjax.uint8(), qjax.moving_average(0.5)), qjax.static(qjax.int8()))),
    ]
    return qjax.quantize(fn, {"w": normal(3, 8, 8)}, qjax.Policy(rules), calibration=[X])


@pytest.fixture(name="folder")
def saved(result, tmp_path):
    qjax.save(tmp_path / "c", result)
    return tmp_path / "c"


def edited(folder, edit):
    file = folder / "qjax.json"
    body = json.loads(file.read_bytes())
    del body["sha256"]
    edit(body)
    file.write_text(json.dumps({**body, "sha256": digest(body)}))


def test_what_comes_back_runs_the_same(result, folder):
    loaded = qjax.load(folder)
    assert (loaded.policy, loaded.report, list(loaded.sites)) == (result.policy, result.report, list(result.sites))
    assert jax.tree.structure(loaded.sites) == jax.tree.structure(result.sites)
    for a, b in zip(jax.tree.leaves(loaded.sites), jax.tree.leaves(result.sites), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    got, want = (jax.jit(qjax.quantized(fn, sites=r.sites))(r.params, X) for r in (loaded, result))
    np.testing.assert_array_equal(got, want)
    assert [q.nbytes for q in loaded.sites.values()] == [0, 36]


def test_a_document_from_before_there_were_products_loads(folder):
    def older(body):
        body.pop("sites", None)
        for row in body["report"]["rows"]:
            row.pop("what", None)

    edited(folder, older)
    loaded = qjax.load(folder)
    assert loaded.sites == {} and all(row.what == "parameter" for row in loaded.report.rows)


def change(field, value, entry=1):
    return lambda body: body["sites"][entry].update({field: value})


DAMAGE = {
    "array gone": (change("lhs_scale", "elsewhere"), "has the product 'mix:dot_general.1' without its array"),
    "scale forgotten": (change("lhs_scale", None), r"must have a lhs_scale and a lhs_zero_point for static\(uint8"),
    "zero point too many": (change("rhs_zero_point", "site00001.lhs_zero_point"), "must have a rhs_scale and no rhs_zero_point"),
    "dynamic with a range": (change("lhs_scale", "site00001.lhs_scale", entry=0), "must have no lhs_scale"),
    "wrong dtype": (change("rhs_scale", "site00001.lhs_zero_point"), "has a rhs_scale of int32, not float32"),
    "wrong shape": (change("rhs_scale", "00000.w.scale"), "which must be one"),
    "two of one name": (change("name", "mix:dot_general.1", entry=0), "two products of one name"),
    "unknown entry": (change("bias", 1), "has the entries 'bias', which this version does not know"),
    "bad spec": (lambda body: body["sites"][0]["lhs"]["spec"].update(bits=9), "`bits` must be an int from 2 to 8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(folder, name):
    edit, message = DAMAGE[name]
    edited(folder, edit)
    with pytest.raises(ValueError, match=message) as caught:
        qjax.load(folder)
    assert str(folder) in str(caught.value)


def test_what_is_no_product_is_not_saved(result, tmp_path):
    with pytest.raises(TypeError, match=r"`sites` has a int at 'x'"):
        qjax.save(tmp_path / "a", qjax.Result(result.params, result.report, result.policy, sites={"x": 3}))
    (bad,) = [q for q in result.sites.values() if q.nbytes]
    bad = type(bad)(None, None, None, None, bad.lhs, bad.rhs)
    with pytest.raises(ValueError, match="must have a lhs_scale"):
        qjax.save(tmp_path / "a", qjax.Result(result.params, result.report, result.policy, sites={"x": bad}))
    assert not (tmp_path / "a" / "qjax.json").exists()


def keys(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {*(value if isinstance(value, dict) else ()), *(key for v in inner for key in keys(v))}


@pytest.mark.parametrize("method", [None, qjax.smoothquant()], ids=["rtn", "smoothquant"])
def test_a_plain_checkpoint_has_no_entry_that_an_older_reader_would_refuse(tmp_path, method):
    """Integers with static activations were there before products, run-time scales and outlier columns were."""
    rule = qjax.Rule("*", weight=qjax.int8(), activation=qjax.static(qjax.int8()), method=method)
    params = {"norm": jnp.ones(6), "w": jnp.eye(6)}
    made = qjax.quantize(lambda p, x: x * p["norm"] @ p["w"], params, qjax.Policy([rule]), [jnp.ones((2, 6))])
    metadata = {"sites": [], "what": "parameter", "outliers": None}  # the caller's own stays as it is
    qjax.save(tmp_path / "ckpt", made, metadata=metadata)
    body = json.loads((tmp_path / "ckpt" / "qjax.json").read_bytes())
    assert body.pop("metadata") == metadata
    assert {"act", "rules", "kernel"} <= keys(body)
    assert not {"sites", "input_scale", "outliers", "unfoldable", "what", "memory"} & keys(body)
    loaded = qjax.load(tmp_path / "ckpt")
    assert (loaded.policy, loaded.report, loaded.sites, loaded.metadata) == (made.policy, made.report, {}, metadata)
    assert loaded.params["w"].act == made.params["w"].act
