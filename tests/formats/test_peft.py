"""Adapters in PEFT's layout: those that PEFT wrote compute here what they computed there; what is written comes back."""

import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Policy, Rule
from qjax.formats import llama_modules, load_peft, save_peft
from qjax.formats.safetensors import read_header, read_tensors, write_tensors
from qjax.runtime import Codes, Layout
from qjax.runtime.layouts import laid_out

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODULES = {"embed": "embed", "up/kernel": "up", "conv/kernel": "conv"}
RULES = {
    "lora": [Rule("up/kernel", train=qjax.lora(3, alpha=4, rank_stabilized=True)),
             Rule("*", train=qjax.lora(2, alpha=6, rank_stabilized=True))],
    "dora": [Rule("embed"), Rule("*", train=qjax.lora(2, alpha=4, dora=True))],
}  # fmt: skip


def net(params, tokens, x, image):
    """The network of tests/golden/make_peft.py, in Flax's layouts."""
    dims = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(image, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=dims)
    return params["embed"][tokens].sum(1) + x @ params["up"]["kernel"], conv


SETTINGS = {"rank": "r", "alpha": "lora_alpha"}


@pytest.fixture(scope="module")
def golden():
    found = np.load(GOLDEN / "peft.npz")
    params = {
        "embed": jnp.asarray(found["weight/embed.weight"]),
        "up": {"kernel": jnp.asarray(found["weight/up.weight"].T)},
        "conv": {"kernel": jnp.asarray(found["weight/conv.weight"].transpose(2, 3, 1, 0))},
    }
    inputs = found["input/tokens"], found["input/x"], found["input/image"].transpose(0, 2, 3, 1)
    return found, params, tuple(map(jnp.asarray, inputs))


@pytest.mark.parametrize("name", RULES)
def test_adapters_that_peft_wrote_compute_what_they_did_there(name, golden, tmp_path):
    found, params, inputs = golden
    tuned = qjax.qlora(net, Policy(RULES[name]))
    plan = tuned.plan(params, *inputs)
    names = {path: module for path, module in MODULES.items() if name == "lora" or path != "embed"}
    adapters = load_peft(GOLDEN / f"peft_{name}", plan, names)
    rows, image = jax.jit(tuned)(adapters, params, *inputs)
    np.testing.assert_allclose(rows, found[f"{name}/0"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(image.transpose(0, 3, 1, 2), found[f"{name}/1"], rtol=1e-4, atol=1e-5)
    # Written again they are PEFT's files: the same tensors to the bit, and the same settings.
    save_peft(tmp_path, plan, adapters, names)
    there, here = (read_tensors(folder / "adapter_model.safetensors") for folder in (GOLDEN / f"peft_{name}", tmp_path))
    assert there.keys() == here.keys()
    for key, a in there.items():
        assert np.array_equal(a, here[key]) and a.dtype == here[key].dtype, key
    theirs, ours = (json.loads((folder / "adapter_config.json").read_text()) for folder in (GOLDEN / f"peft_{name}", tmp_path))
    for module in names.values():
        ranks, alphas = ([c[f"{key}_pattern"].get(module, c[default]) for c in (theirs, ours)] for key, default in SETTINGS.items())
        assert ranks[0] == ranks[1] and alphas[0] == alphas[1]
    same = ("peft_type", "use_rslora", "use_dora", "target_modules", "bias", "fan_in_fan_out", "lora_dropout")
    assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}
    assert ours.keys() <= theirs.keys()


def test_stacked_layers_and_experts_are_a_module_each(tmp_path):
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"]["up"]["kernel"])[0]

    params, x = {"layers": {"up": {"kernel": jnp.ones((3, 4, 4))}}}, jnp.ones((2, 4))
    tuned = qjax.qlora(fn, Policy([Rule("*", train=qjax.lora(2, dropout=0.1))]))
    plan = tuned.plan(params, x)
    adapters = jax.tree.map(lambda a: a + jnp.arange(a.size).reshape(a.shape), tuned.init(jax.random.key(0), params, x))
    names = {"layers/up/kernel": [f"model.layers.{i}.mlp.up_proj" for i in range(3)]}
    save_peft(tmp_path, plan, adapters, names)
    header = read_header(tmp_path / "adapter_model.safetensors")
    assert header["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"].shape == (4, 2) and len(header) == 6
    chex.assert_trees_all_equal(load_peft(tmp_path, plan, names), adapters)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    save_peft(tmp_path / "own", plan, adapters, dtype=jnp.bfloat16)
    assert "base_model.model.layers.up.1.lora_A.weight" in read_header(tmp_path / "own" / "adapter_model.safetensors")


def test_what_does_not_fit_is_named(golden, tmp_path):
    _, params, inputs = golden
    folder = GOLDEN / "peft_lora"

    def plan(*rules):
        return qjax.qlora(net, Policy(rules)).plan(params, *inputs)

    whole, kind = plan(*RULES["lora"]), {"alpha": 6, "rank_stabilized": True}
    with pytest.raises(ValueError, match=r"lacks 'base_model.model.other.lora_A.weight': give the module of 'conv/kernel'"):
        load_peft(folder, whole, {"conv/kernel": "other", "up/kernel": "another"})
    with pytest.raises(ValueError, match="which is no adapter of the policy"):
        load_peft(folder, plan(Rule("conv/kernel", train=qjax.lora(2, **kind)), Rule("*")))
    with pytest.raises(ValueError, match="says `rank` 3 for 'up', and the policy 2"):
        load_peft(folder, plan(Rule("*", train=qjax.lora(2, **kind))))
    with pytest.raises(ValueError, match="says `use_rslora` True"):
        load_peft(folder, plan(Rule("*", train=qjax.lora(2, alpha=6))))
    with pytest.raises(ValueError, match="gives the module 'up' to two parameters"):
        load_peft(folder, whole, {"conv/kernel": "up"})
    with pytest.raises(ValueError, match="`names` has 'head', which has no adapter"):
        load_peft(folder, whole, {"head": "head"})
    mixed = plan(Rule("up/kernel", train=qjax.lora(2, dora=True)), Rule("*", train=qjax.lora(2)))
    with pytest.raises(ValueError, match="differ in `dora`"):
        save_peft(tmp_path, mixed, {})
    shutil.copytree(folder, tmp_path / "bad")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    wide = {"base_model.model.up.lora_A.weight": np.zeros((3, 9), np.float32)}
    write_tensors(tmp_path / "bad" / "adapter_model.safetensors", tensors | wide)
    with pytest.raises(ValueError, match=r"of shape \(3, 9\), and the parameter wants \(3, 5\)"):
        load_peft(tmp_path / "bad", whole)


def line(params, x):
    return x @ params["up"]["kernel"]


X = jnp.ones((2, 256))
FLOATS = {"up": {"kernel": jnp.sin(jnp.arange(256.0 * 128)).reshape(256, 128)}}
NF4 = qjax.nf4(double_quant=True)
PLAIN = Policy([Rule("*", weight=NF4, train=qjax.lora(2))])
LOFTQ = Policy([Rule("*", weight=NF4, method=qjax.loftq(2), train=qjax.lora(2))])
TUNED = qjax.qlora(line, PLAIN)


# A layout with a byte a code.
WIDE = Layout(
    "wide",
    lambda weight, codes: {"w": codes.codes, "s": codes.scale, "t": codes.levels},
    lambda weight, k, laid: Codes(laid["w"], laid["s"], None, laid["t"]),
)


def packed(policy, params=FLOATS):
    return qjax.quantize(line, params, policy, calibration=[X]).params


def trained(base):
    return jax.tree.map(lambda a: a + 0.5, TUNED.init(jax.random.key(0), base, X))


@pytest.mark.parametrize(("mine", "other"), [(PLAIN, LOFTQ), (LOFTQ, PLAIN)])
def test_a_folder_knows_its_base(mine, other, tmp_path):
    base, plan = packed(mine), TUNED.plan(FLOATS, X)
    adapters = trained(base)
    save_peft(tmp_path, plan, adapters, base=base)
    # The same weights: attached; laid out for a kernel, which knows no scales of scales. And no base: not looked at.
    laid = {"up": {"kernel": laid_out(base["up"]["kernel"], WIDE, 0, 0)}}
    assert laid["up"]["kernel"].spec != NF4
    for same in (base, TUNED.attach(adapters, base, X), laid, None):
        chex.assert_trees_all_equal(load_peft(tmp_path, plan, base=same), adapters)
    for another in (packed(other), packed(mine, {"up": {"kernel": FLOATS["up"]["kernel"].T.reshape(256, 128)}}), FLOATS):
        with pytest.raises(ValueError, match=r"is not the one .* 1 of 1 leaves differ, 'up/kernel' by about [\d.]+ times .*give that base"):
            load_peft(tmp_path, plan, base=another)
    with pytest.raises(ValueError, match=r"`base` has no leaf 'up/kernel'.*give the parameters that it was made with"):
        load_peft(tmp_path, plan, base=adapters)
    with pytest.raises(TypeError, match="`base` leaf 'up/kernel' is a shape and holds no numbers"):
        save_peft(tmp_path, plan, adapters, base=jax.eval_shape(lambda: FLOATS))
    chex.assert_trees_all_equal(load_peft(tmp_path, plan, base=base), adapters)  # refused, it is not half-written
    assert not {"base", "qjax.base"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()  # older PEFT refuses further keys


def test_folders_that_say_nothing_of_their_base_load_beside_any(golden, tmp_path):
    _, params, inputs = golden
    plan = qjax.qlora(net, Policy(RULES["lora"])).plan(params, *inputs)
    chex.assert_trees_all_equal(load_peft(GOLDEN / "peft_lora", plan, MODULES, base=params), load_peft(GOLDEN / "peft_lora", plan, MODULES))
    base, plan = packed(PLAIN), TUNED.plan(FLOATS, X)
    save_peft(tmp_path, plan, trained(base))
    load_peft(tmp_path, plan, base=packed(LOFTQ))
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    for text in ("{", "[1]", '{"up": [1]}', '{"up": 1}'):
        write_tensors(tmp_path / "adapter_model.safetensors", tensors, {"qjax.base": text})
        with pytest.raises(ValueError, match="damaged note on its base: copy it again, or leave `base` out"):
            load_peft(tmp_path, plan, base=base)
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {"qjax.base": json.dumps({"down": [1.0] * 9})})
    with pytest.raises(ValueError, match="a note on other weights"):
        load_peft(tmp_path, plan, base=base)


def test_one_layer_of_a_stack_of_another_base_is_seen(tmp_path):
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    base, x = {"w": jnp.sin(jnp.arange(3 * 64.0).reshape(3, 8, 8))}, jnp.ones((2, 8))
    tuned = qjax.qlora(fn, Policy([Rule("*", train=qjax.lora(2))]))
    plan = tuned.plan(base, x)
    save_peft(tmp_path, plan, tuned.init(jax.random.key(0), base, x), {"w": ["a", "b", "c"]}, base=base)
    load_peft(tmp_path, plan, {"w": ["a", "b", "c"]}, base=base)
    with pytest.raises(ValueError, match="`base` is not the one"):
        load_peft(tmp_path, plan, {"w": ["a", "b", "c"]}, base={"w": base["w"].at[1, 3, 3].add(0.01)})
    # A layer is known by its module: the same adapters beside the same layers, one parameter each.
    unrolled = qjax.qlora(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], tuned.policy)
    apart = dict(zip("abc", base["w"], strict=True))
    back = load_peft(tmp_path, unrolled.plan(apart, x), {name: name for name in "abc"}, base=apart)
    assert back["b"]["a"].shape == (1, 2, 8)


PLAN, ADAPTERS = TUNED.plan(FLOATS, X), TUNED.init(jax.random.key(0), packed(PLAIN), X)
UP = ADAPTERS["up/kernel"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "`dtype` must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"dtype": jnp.int8}, ValueError, "`dtype` must be one of .* got 'int8'"),
        ({"dtype": "float63"}, ValueError, "`dtype` must be one of .* got 'float63'"),
        ({"dtype": 16}, ValueError, "`dtype` must be one of .* got 16"),
        ({"dtype": "float16", "adapters": {"up/kernel": UP | {"a": UP["a"] + 1e5}}}, ValueError, "cannot hold .*'a', .*take 'bfloat16'"),
        ({"plan": TUNED}, TypeError, r"`plan` must be tuned.plan\(base, \*args\) .* got QLoRA"),
        ({"plan": PLAIN}, TypeError, "`plan` must be .* got Policy"),
        ({"plan": None}, TypeError, "`plan` must be .* got NoneType"),
        ({"plan": ADAPTERS}, TypeError, "`plan` must be .* got dict"),
        ({"plan": {}}, ValueError, "`plan` is empty: give tuned.plan"),
        ({"adapters": None}, TypeError, "`adapters` must be what .init.* got NoneType"),
        ({"adapters": packed(PLAIN)}, TypeError, "`adapters` must be what .init.* packed leaves"),
        ({"adapters": {}}, ValueError, "`adapters` lacks 'up/kernel'.*the policy or the program is not that of"),
        ({"adapters": {"down/kernel": UP}}, ValueError, "`adapters` holds 'down/kernel'"),
        ({"adapters": {"up/kernel": {"a": UP["a"]}}}, ValueError, "`adapters` of 'up/kernel' have shapes"),
        ({"adapters": {"up/kernel": UP | {"b": UP["b"][:4]}}}, ValueError, r"'b': \(4, 2\).* the policy wants .*\(128, 2\)"),
        ({"adapters": {"up/kernel": UP | {"b": [[1.0]]}}}, TypeError, "'up/kernel' 'b' must be an array, got list: give what"),
        ({"names": "layers"}, TypeError, "`names` must be a mapping from paths to modules such as .'up/kernel': .* got 'layers'"),
        ({"names": ["up"]}, TypeError, "`names` must be a mapping"),
        ({"names": {"up/kernel": 3}}, TypeError, r"`names\['up/kernel'\]` must be a module .* got 3"),
        ({"names": {"up/kernel": ""}}, TypeError, r"`names\['up/kernel'\]` must be a module"),
        ({"names": {"up/kernel": ["a", "b"]}}, ValueError, "has 2 modules, and the parameter stacks 1"),
        ({"names": {"l": "up"}}, ValueError, "`names` has 'l', which has no adapter: .*up/kernel; leave it out, or give it one"),
        ({"base_model": pathlib.Path("llama")}, TypeError, "`base_model` must be a string"),
        ({"base": {"up": {"kernel": X}}}, ValueError, r"`base` leaf 'up/kernel' has shape \(2, 256\), .*one of shape \(256, 128\)"),
        ({"folder": None}, TypeError, "`folder` must be a path, got NoneType: it comes first"),
        ({"folder": PLAN}, TypeError, "`folder` must be a path, got dict: it comes first"),
    ],
)
def test_what_save_peft_refuses_it_names_and_writes_nothing(change, error, message, tmp_path):
    save_peft(tmp_path / "it", PLAN, ADAPTERS)
    before = {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()}
    for folder in (tmp_path / "it", tmp_path / "new"):
        with pytest.raises(error, match=message):
            save_peft(**({"folder": folder, "plan": PLAN, "adapters": ADAPTERS} | change))
    assert {file.name: file.read_bytes() for file in (tmp_path / "it").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16, np.float16, np.dtype("float32")])
def test_the_floats_that_adapters_may_be_written_in(dtype, tmp_path):
    save_peft(tmp_path, PLAN, ADAPTERS, dtype=dtype)
    (a, _) = read_tensors(tmp_path / "adapter_model.safetensors").values()
    assert a.dtype == jnp.dtype(dtype)


def test_what_load_peft_refuses_it_names_with_a_remedy(tmp_path):
    both = qjax.qlora(lambda p, x: x @ p["up"]["kernel"] @ p["down"]["kernel"], Policy([Rule("*", train=qjax.lora(2))]))
    plan = both.plan(FLOATS | {"down": {"kernel": jnp.ones((128, 8))}}, X)
    folder, file = tmp_path / "it", tmp_path / "file"
    save_peft(folder, PLAN, ADAPTERS)
    file.write_text("here")
    with pytest.raises(ValueError, match=r"lacks '.*down.lora_A.weight': .*`names`.*fewer adapters, put a rule without `train`"):
        load_peft(folder, plan)
    for bad in (TUNED, PLAIN, None, ADAPTERS):
        with pytest.raises(TypeError, match=rf"`plan` must be tuned.plan.*got {type(bad).__name__}"):
            load_peft(folder, bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"`names` must be a mapping .* got 'up'"):
        load_peft(folder, PLAN, "up")  # pyright: ignore[reportArgumentType]
    for use in (lambda at: load_peft(at, PLAN), lambda at: save_peft(at, PLAN, ADAPTERS)):
        for at in (file, str(file), file / "inside"):
            with pytest.raises(NotADirectoryError, match=r"`folder` .* cannot be one, for '.*file' is a file: give another path"):
                use(at)
    assert file.read_text() == "here"
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json` is missing: give the folder"):
        load_peft(tmp_path / "none", PLAN)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    write_tensors(folder / "adapter_model.safetensors", {name: a.astype(np.int8) for name, a in tensors.items()})
    with pytest.raises(ValueError, match=r"lora_A.weight' as int8, and adapters are floats: save the trained ones again"):
        load_peft(folder, PLAN)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (({"rank_pattern": [1]}, "pattern that is no object"), ({"bias": "all"}, "trains biases .*bias='none'"),
                            ({"peft_type": "IA3"}, "`peft_type` 'IA3', and only 'LORA' can be read: ")):  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_peft(folder, PLAN)


def test_the_modules_of_a_llama():
    with pytest.raises(TypeError, match=r"`paths` must hold paths, .*got the string 'lm_head/kernel'"):
        llama_modules("lm_head/kernel")
    with pytest.raises(ValueError, match=r"`paths` has 'w', which is no parameter of qjax.models.Llama: write"):
        llama_modules(["w"])
    assert llama_modules(["layers_3/mlp/up_proj/kernel", "lm_head/kernel", "embed_tokens/embedding"]) == {
        "layers_3/mlp/up_proj/kernel": "model.layers.3.mlp.up_proj",
        "lm_head/kernel": "lm_head",
        "embed_tokens/embedding": "model.embed_tokens",
    }
