"""Damaged and hostile checkpoints: an error that names the file, or the same data; never anything else."""

import copy
import hashlib
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core import quantize
from qjax.formats.document import LAYOUT, digest


@pytest.fixture(name="sound", scope="module")
def sound_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound")
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)

    def fn(params, x):
        return x @ params["w"] + params["b"]

    policy = qjax.Policy([qjax.Rule("w", weight=qjax.uint4(group_size=16), method=qjax.rtn())])
    result = qjax.quantize(fn, {"w": w, "b": jnp.arange(8.0)}, policy, [jnp.ones((2, 64))])
    params = result.params | {"nf4": (quantize(w, qjax.nf4(), (0,)), None, 3), "bf16": [quantize(w, qjax.bf16(), (0,))]}
    qjax.save(path, type(result)(params, result.report, result.policy), metadata={"a": [1, {"b": None}]})
    return path


@pytest.fixture(name="broken")
def copy_to_break(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "c")
    return tmp_path / "c"


def outcome(path):
    """None for an error of a kind that is promised and names a file, else what was loaded."""
    try:
        return qjax.load(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), error
        return None


def assert_same(a, b):
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert (a.report, a.policy, a.metadata) == (b.report, b.policy, b.metadata)


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_a_flipped_byte_anywhere_is_noticed(sound, broken):
    rng, good = random.Random(0), qjax.load(sound)
    noticed = 0
    for file in files(broken):
        data = file.read_bytes()
        for _ in range(12 if file.name == "qjax.json" else 2):
            at = rng.randrange(len(data))
            file.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
            found = outcome(broken)
            noticed += found is None
            if found is not None:
                assert_same(good, found)
        file.write_bytes(data)
    assert noticed > 30
    assert_same(good, qjax.load(broken))


def test_a_missing_file_and_a_cut_one_are_named(broken):
    for file in files(broken):
        data = file.read_bytes()
        for length in {0, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:length])
            assert outcome(broken) is None or file.name == "qjax.json"  # which ends in a newline that nobody misses
        file.write_bytes(data + b"\0")
        assert outcome(broken) is None
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            qjax.load(broken)
        file.mkdir()
        with pytest.raises((FileNotFoundError, ValueError), match=file.name):
            qjax.load(broken)
        file.rmdir()
        file.write_bytes(data)


def test_swapped_arrays_are_noticed(broken):
    """Two files of the same size and type, exchanged: only their checksums tell."""
    codes = [p for p in files(broken) if p.parent.name.endswith((".w.codes", ".nf4.0.codes")) and p.name == "0.0"]
    a, b = (p.read_bytes() for p in codes)
    assert len(a) == len(b) and a != b
    codes[0].write_bytes(b)
    codes[1].write_bytes(a)
    with pytest.raises(ValueError, match=r"\.codes` is damaged: its bytes do not have the checksum"):
        qjax.load(broken)
    assert not np.array_equal(qjax.load(broken, verify=False).params["w"].codes, np.frombuffer(a, np.uint8))


# A hostile file has a seal too: whatever it says is checked again.


def edited(path, edit):
    file = path / "qjax.json"
    body = json.loads(file.read_bytes())
    del body["sha256"]
    edit(body)
    file.write_text(json.dumps({**body, "sha256": digest(body)}))
    return path


def leaf(body, path):
    return next(leaf for leaf in body["leaves"] if leaf["path"] == path)


FILE = {"size": 1, "sha256": None}


def packed(body):
    return leaf(body, "w")["packed"]


def spec(body):
    return packed(body)["spec"]


def array(body, path):
    return body["arrays"][leaf(body, path)["array"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b.update(layout=LAYOUT + 1, written_by={"qjax": "9.1"}), "layout 2, .*install qjax 9.1 or later"),
        (lambda b: b.update(layout=0), "layout 0, which never was"),
        (lambda b: b.update(format="other"), "is not the document of a qjax checkpoint"),
        (lambda b: b.pop("leaves"), "lacks 'leaves'"),
        (lambda b: b.update(extra=1), "entries 'extra', which this version does not know"),
        (lambda b: spec(b).update(kind="mx"), r"leaves\[\d\].packed.spec has the kind 'mx'.*newer qjax"),
        (lambda b: spec(b).update(bits=9), r"packed.spec: `bits` must be an int from 2 to 8, got 9"),
        (lambda b: spec(b).update(bits=8), "`codes` of `w` must be uint8 of shape"),
        (lambda b: spec(b).update(bits="4"), r"spec.bits must be a int, the file has '4'"),
        (lambda b: spec(b).update(symmetric=True), "`w` must have a scale and no zero point"),
        (lambda b: spec(b)["granularity"].update(size=32), "`scale` of `w` must be float32 of shape"),
        (lambda b: spec(b)["granularity"].update(size=48), "`group_size`=48 does not divide"),
        (lambda b: packed(b).update(axes=[0]), "`w` has the axes"),
        (lambda b: packed(b).update(axes=[-3]), "`axes` must be different axes"),
        (lambda b: packed(b).update(sizes=[128]), "`codes` of `w` must be"),
        (lambda b: packed(b).update(sizes=[]), "which no quantized array has"),
        (lambda b: packed(b).update(dtype="object"), "of 'object': a newer qjax"),
        (lambda b: packed(b).update(scale="missing"), "leaf 'w' without its array"),
        (lambda b: packed(b).update(scale=None), "`w` must have a scale"),
        (lambda b: packed(b).update(perm=leaf(b, "b")["array"]), "`perm` of `w` must be int32"),
        (lambda b: leaf(b, "b").update(key="threefry2x32"), "damaged at 'b': .*key data"),
        (lambda b: leaf(b, "b").update(key="os.urandom"), "random keys of 'os.urandom' at 'b'"),
        (lambda b: array(b, "b").update(shape=[2**40]), "is not of an uncompressed array of shape"),
        (lambda b: array(b, "b").update(shape=[2**40, 0, 2**40]), "which no array has"),
        (lambda b: array(b, "b").update(shape=[-8]), "which no array has"),
        (lambda b: array(b, "b").update(dtype="float64"), "the document says float64"),
        (lambda b: array(b, "b").update(dtype="O"), "of 'O': a newer qjax may know this dtype"),
        (lambda b: b["arrays"].update({"../x": dict(array(b, "b"))}), r"named '\.\./x'"),
        (lambda b: b.update(folder="../elsewhere"), "has the array folder '../elsewhere'"),
        (lambda b: b.update(folder=None), "no folder for them"),
        (lambda b: b["files"].update({"../../secret": FILE}), "cannot have a file '../../secret'"),
        (lambda b: b["files"].update({"/etc/hostname": FILE}), "cannot have a file '/etc/hostname'"),
        (lambda b: b.update(tree={"leaf": 99}), "a node that means nothing"),
        (lambda b: b.update(tree={"exec": "x"}), "a node that means nothing"),
        (lambda b: b["policy"]["rules"][0].update(method={"kind": "os.system"}), "method has the kind 'os.system'"),
        (lambda b: b["report"]["rows"][0].update(nbytes=None), "rows.0..nbytes must be a int"),
    ],
)  # fmt: skip
def test_a_sealed_document_that_lies_is_refused_by_name(broken, edit, message):
    with pytest.raises(ValueError, match=message) as caught:
        qjax.load(edited(broken, edit))
    assert str(broken) in str(caught.value)


def test_metadata_of_an_array_that_promises_more_than_is_there_is_refused(broken):
    """Everything agrees that `b` has a terabyte, but for the file: nothing is allocated."""
    file = next(broken.rglob("*.b/.zarray"))
    meta = json.loads(file.read_bytes())
    for chunks in (meta["chunks"], [2**38], [0], ["8"], [2**38, 1]):
        file.write_text(json.dumps(meta | {"shape": [2**38], "chunks": chunks}))

        def lie(body):
            array(body, "b").update(shape=[2**38])
            name = file.relative_to(broken / body["folder"]).as_posix()
            content = file.read_bytes()
            body["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        with pytest.raises(ValueError, match=r"\.b` holds 32 bytes in 1 files|does not say into what chunks"):
            qjax.load(edited(broken, lie))


def test_any_sealed_change_raises_what_is_promised(sound, broken):
    """Replaces random values of the document by values of other kinds, and seals it again."""
    rng = random.Random(1)
    body = json.loads((sound / "qjax.json").read_bytes())
    del body["sha256"]
    others = [
        None,
        True,
        -1,
        0,
        2**70,
        1.5,
        "x",
        "",
        [],
        {},
        [[1]],
        {"kind": "int"},
        {"kind": ["int"]},
        {"float": "nan"},
        {"leaf": 0},
    ]
    refused = 0
    for _ in range(300):
        changed = copy.deepcopy(body)
        places = list(walk(changed))
        holder, key = rng.choice(places)
        match rng.randrange(3):
            case 0:
                holder[key] = copy.deepcopy(rng.choice(others))
            case 1:
                other, at = rng.choice(places)
                holder[key] = copy.deepcopy(other[at])
            case 2:
                del holder[key]
        (broken / "qjax.json").write_text(json.dumps({**changed, "sha256": digest(changed)}))
        refused += outcome(broken) is None
    assert refused > 150


def walk(value):
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from walk(child)


def test_a_document_nested_without_end_is_refused(sound, broken):
    file = broken / "qjax.json"
    file.write_text('{"format": "qjax-checkpoint", "layout": 1, "tree": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"qjax\.json"):
        qjax.load(broken)

    for depth in (100, 300, 440, 470):  # the parser, the seal or the tree gives up first
        shutil.copy(sound / "qjax.json", file)

        def deepen(body, depth=depth):
            for _ in range(depth):
                body["tree"] = {"list": [body["tree"]]}

        outcome(edited(broken, deepen))


def test_a_fresh_folder_and_other_json_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of qjax"):
        qjax.load(tmp_path)
    for text in (
        "[]",
        "",
        "nul",
        '"qjax-checkpoint"',
        "{}",
        "\ud83d".encode("utf-8", "surrogatepass").decode("latin1"),
    ):
        (tmp_path / "qjax.json").write_text(text)
        with pytest.raises(ValueError, match=r"qjax\.json"):
            qjax.load(tmp_path)
