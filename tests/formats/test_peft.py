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


def test_the_modules_of_a_llama():
    assert llama_modules(["layers_3/mlp/up_proj/kernel", "lm_head/kernel", "embed_tokens/embedding"]) == {
        "layers_3/mlp/up_proj/kernel": "model.layers.3.mlp.up_proj",
        "lm_head/kernel": "lm_head",
        "embed_tokens/embedding": "model.embed_tokens",
    }
