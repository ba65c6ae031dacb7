"""Checkpoints: round trips, every refusal by name, damaged files, interrupted saves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.formats.huggingface import llama_placements, load_checkpoint, load_tokenizer, save_checkpoint
from qjax.formats.llama_config import LlamaConfig, RopeScaling
from qjax.formats.safetensors import read_header, read_tensors, tensor_index, write_tensors
from qjax.models.shipped import books_llama_folder

TINY = LlamaConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=6,
    max_position_embeddings=32,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def tiny_tensors(config=TINY, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 1, place.shape).astype(dtype) for name, place in llama_placements(config).items()}


def write_tiny(folder, config=TINY, tensors=None, **changes):
    values = config.to_hf() | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "REMOVED"}))
    write_tensors(folder / "model.safetensors", tiny_tensors(config) if tensors is None else tensors)
    return folder


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# What is read


def test_shipped_checkpoint_is_read_to_the_bit():
    checkpoint = load_checkpoint(books_llama_folder())
    stored = read_tensors(books_llama_folder() / "model.safetensors")
    assert stored["model.norm.weight"].dtype == ml_dtypes.bfloat16
    down = checkpoint.params["layers_2"]["mlp"]["down_proj"]["kernel"]
    assert down.shape == (768, 256)
    assert down.dtype == jnp.float32
    np.testing.assert_array_equal(down, stored["model.layers.2.mlp.down_proj.weight"].T.astype(np.float32))
    narrow = load_checkpoint(books_llama_folder(), jnp.bfloat16).params["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(np.asarray(narrow), stored["model.embed_tokens.weight"])
    assert sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params)) == 4_196_608
    assert checkpoint.model_kind == "llama"
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("It was the best of times.").ids).endswith(
        "of times."
    )


def test_every_tensor_lands_in_its_own_place(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "attention_bias": True, "mlp_bias": True})
    params = load_checkpoint(write_tiny(tmp_path / "m", config)).params
    tensors = tiny_tensors(config)
    assert len(jax.tree.leaves(params)) == len(tensors) == 1 + 2 * (2 + 7 + 7) + 1 + 1
    np.testing.assert_array_equal(
        params["layers_1"]["self_attn"]["k_proj"]["kernel"].T, tensors["model.layers.1.self_attn.k_proj.weight"]
    )
    np.testing.assert_array_equal(
        params["layers_0"]["mlp"]["up_proj"]["bias"], tensors["model.layers.0.mlp.up_proj.bias"]
    )
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, tensors["lm_head.weight"])
    np.testing.assert_array_equal(
        params["layers_1"]["post_attention_layernorm"]["scale"],
        tensors["model.layers.1.post_attention_layernorm.weight"],
    )


def test_shards_are_read_like_one_file(tmp_path):
    whole = load_checkpoint(write_tiny(tmp_path / "whole")).params
    split_in_shards(write_tiny(tmp_path / "shards"))
    sharded = load_checkpoint(tmp_path / "shards").params
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def split_in_shards(folder):
    tensors = read_tensors(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in parts.items():
        write_tensors(folder / shard, {name: tensors[name] for name in held})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, held in parts.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


@pytest.mark.parametrize("kind", ["unequal", "equal"])
def test_a_stored_head_beside_tied_embeddings(tmp_path, kind):
    config = LlamaConfig(**{**vars(TINY), "tie_word_embeddings": True})
    tensors = tiny_tensors(config) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (kind == "unequal")
    folder = write_tiny(tmp_path / "m", config, tensors)
    if kind == "equal":
        assert "lm_head" not in load_checkpoint(folder).params
        return
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    one_line(error, "lm_head.weight", "tie_word_embeddings", "set it to false")


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["`architectures`", "GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": "REMOVED"}, ["`architectures`", "None"]),
        ({"hidden_size": "REMOVED"}, ["`hidden_size` is missing", "add it"]),
        ({"hidden_size": 12.5}, ["`hidden_size`", "12.5"]),
        ({"hidden_size": True}, ["`hidden_size`", "True"]),
        ({"num_hidden_layers": 0}, ["`num_hidden_layers`", "0"]),
        ({"num_hidden_layers": 10**12}, ["`num_hidden_layers`", "only 21 tensors"]),
        ({"num_key_value_heads": 2}, ["`num_key_value_heads` must divide", "3 by 2"]),
        ({"head_dim": 5}, ["`head_dim` must be even", "5"]),
        ({"rms_norm_eps": -1.0}, ["`rms_norm_eps`", "-1.0"]),
        ({"rope_theta": "big"}, ["`rope_theta`", "big"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["`rope_scaling`", "yarn", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["rope_scaling.low_freq_factor", "None"]),
        ({"rope_parameters": {"rope_theta": 5.0}}, ["`rope_theta` is given twice", "10000.0", "5.0"]),
        ({"hidden_act": "gelu"}, ["`hidden_act`", "gelu", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["`quantization_config`", "float checkpoint"]),
        ({"sliding_window": 16}, ["`sliding_window` 16", "null"]),
        ({"tie_word_embeddings": 1}, ["`tie_word_embeddings`", "1"]),
        ({"eos_token_id": "end"}, ["`eos_token_id`", "end"]),
        ({"vocab_size": 20}, ["model.embed_tokens.weight", "(19, 12)", "(20, 12)"]),
        ({"attention_bias": True}, ["lacks the tensor 'model.layers.0.self_attn.q_proj.bias'"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "does not imply"]),
        ({"tie_word_embeddings": True, "num_hidden_layers": 3}, ["lacks the tensor 'model.layers.2."]),
    ],
)
def test_a_wrong_config_is_named(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        load_checkpoint(write_tiny(tmp_path / "m", **changes))
    one_line(error, *words)


def test_wrong_tensors_are_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    for change, words in (
        (lambda t: t.pop(name), [f"lacks the tensor {name!r}", "download"]),
        (lambda t: t.update({name: t[name].T}), [name, "(12, 14)", "(14, 12)"]),
        (lambda t: t.update({name: t[name].astype(np.int8)}), [name, "dtype I8", "F32, F16, BF16"]),
        (lambda t: t.update({name: t[name].astype(np.float64)}), [name, "dtype F64"]),
        (lambda t: t.update({"model.extra": t[name]}), ["'model.extra'", "remove the tensor"]),
    ):
        tensors = tiny_tensors()
        change(tensors)
        with pytest.raises(ValueError) as error:
            load_checkpoint(write_tiny(tmp_path / "m", tensors=tensors))
        one_line(error, *words)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / "none")
    one_line(error, "none", "`folder`")
    folder = write_tiny(tmp_path / "m")
    shutil.copytree(folder, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(tmp_path / "no_weights")
    one_line(error, "model.safetensors", "convert it")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_checkpoint(folder)
    one_line(error, "config.json", "is missing")


def test_wrong_shards_are_named(tmp_path):
    folder = write_tiny(tmp_path / "m")
    index = split_in_shards(folder)
    name, shard = next(iter(index["weight_map"].items()))
    other = "model-00002-of-00002.safetensors"

    def refused(weight_map, *words):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_checkpoint(folder)
        one_line(error, *words)

    refused(index["weight_map"] | {name: other}, name, "does not place there")
    refused(index["weight_map"] | {"model.new": shard}, shard, "lacks 'model.new'")
    refused(index["weight_map"] | {name: "../../outside.safetensors"}, "../../outside.safetensors", "same folder")
    refused(index["weight_map"] | {name: "absent.safetensors"}, "absent.safetensors", "is missing")
    refused([], "weight_map")
    refused({name: 3}, "weight_map")


def test_param_dtype_must_be_a_float(tmp_path):
    with pytest.raises(ValueError) as error:
        load_checkpoint(write_tiny(tmp_path / "m"), jnp.int8)
    one_line(error, "'int8'", "bfloat16, float16, float32")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b'{"model": {}}', b"{}", b"[" * 100_000])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    one_line(error, "tokenizer.json", "again")


def test_a_tokenizer_too_large_for_the_embedding_is_named(tmp_path):
    folder = write_tiny(tmp_path / "m")
    shutil.copy(books_llama_folder() / "tokenizer.json", folder)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    one_line(error, "4096 tokens", "`vocab_size` is 19")


# Configs


def test_config_round_trip():
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    for config in (
        TINY,
        LlamaConfig(**{**vars(TINY), "rope_scaling": scaling, "eos_token_ids": (2, 5), "mlp_bias": True}),
    ):
        assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
        assert hash(config) == hash(LlamaConfig(**vars(config)))


def test_config_of_llama_3_1_and_defaults():
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-05,
        "eos_token_id": [128001, 128008, 128009],
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "pretraining_tp": 1,
    }
    config = LlamaConfig.from_hf(values)
    assert (config.head_dim, config.rope_scaling) == (128, RopeScaling(8.0, 1.0, 4.0, 8192))
    assert config.eos_token_ids == (128001, 128008, 128009)
    bare = {k: values[k] for k in list(values)[:5]} | {"vocab_size": 32000}
    plain = LlamaConfig.from_hf(bare)
    assert (plain.num_key_value_heads, plain.rms_norm_eps, plain.rope_theta) == (32, 1e-6, 10000.0)
    assert (plain.max_position_embeddings, plain.tie_word_embeddings, plain.bos_token_id) == (2048, False, None)


# Saving


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16])
def test_save_and_load(tmp_path, dtype):
    first = load_checkpoint(write_tiny(tmp_path / "m"))
    save_checkpoint(tmp_path / "deep" / "saved", first.config, first.params, dtype=dtype)
    second = load_checkpoint(tmp_path / "deep" / "saved")
    assert second.config == first.config
    expected = (
        first.params if dtype is None else jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), first.params)
    )
    jax.tree.map(np.testing.assert_array_equal, second.params, expected)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["saved"]
    stored = {info.dtype for info in read_header(tmp_path / "deep" / "saved" / "model.safetensors").values()}
    assert stored == {{None: "F32", jnp.bfloat16: "BF16", jnp.float16: "F16"}[dtype]}


def test_shipped_checkpoint_survives_a_round_trip_byte_for_byte(tmp_path):
    first = load_checkpoint(books_llama_folder(), jnp.bfloat16)
    save_checkpoint(tmp_path / "saved", first.config, first.params, first.tokenizer)
    stored, again = (read_tensors(f / "model.safetensors") for f in (books_llama_folder(), tmp_path / "saved"))
    assert set(stored) == set(again)
    for name, tensor in stored.items():
        assert tensor.tobytes() == again[name].tobytes(), name
    text = "A sentence, with 3 numbers."
    second = load_checkpoint(tmp_path / "saved")
    assert second.tokenizer is not None
    assert first.tokenizer is not None
    assert second.tokenizer.encode(text).ids == first.tokenizer.encode(text).ids
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_cannot_be_saved_is_named_and_leaves_nothing(tmp_path):
    params = load_checkpoint(write_tiny(tmp_path / "m")).params
    flat = params["layers_0"]["mlp"]["up_proj"]["kernel"]

    def refused(change, *words, **rest):
        tree = jax.tree.map(lambda x: x, params)
        change(tree)
        with pytest.raises(ValueError) as error:
            save_checkpoint(tmp_path / "out", TINY, tree, **rest)
        one_line(error, *words)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]

    def put(value):
        return lambda tree: tree["layers_0"]["mlp"]["up_proj"].update(kernel=value)

    refused(put(flat.T), "layers_0/mlp/up_proj/kernel", "(14, 12)", "(12, 14)")
    refused(put(flat.astype(jnp.int8)), "layers_0/mlp/up_proj/kernel", "int8")
    refused(put({"codes": flat}), "layers_0/mlp/up_proj/kernel/codes", "remove it")
    refused(put([flat]), "layers_0/mlp/up_proj/kernel", "list", "dequantize first")
    refused(put(flat.at[0, 0].set(jnp.nan)), "layers_0/mlp/up_proj/kernel", "not finite")
    refused(put(flat.at[0, 0].set(1e6)), "not finite as float16", dtype=jnp.float16)
    refused(lambda tree: tree["norm"].pop("scale"), "lacks 'norm/scale'")
    refused(lambda tree: tree.update(layers={}), "unstack_layers")


def test_an_existing_folder_is_never_overwritten(tmp_path):
    folder = write_tiny(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = load_checkpoint(folder)
    with pytest.raises(FileExistsError) as error:
        save_checkpoint(folder, checkpoint.config, checkpoint.params)
    one_line(error, "already holds something", "new name")
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", checkpoint.config, checkpoint.params)
    load_checkpoint(tmp_path / "empty")


def run_saver(code, tmp_path, **rest):
    head = f"""
import sys
from pathlib import Path
from qjax.formats.huggingface import load_checkpoint, save_checkpoint
first, out = load_checkpoint({str(books_llama_folder())!r}), Path({str(tmp_path)!r})
"""
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **rest)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # writes fail after a megabyte, as on a full disk
try:
    save_checkpoint(out / "saved", first.config, first.params, first.tokenizer)
except OSError as error:
    print(str(error))
"""
    out, err = run_saver(code, tmp_path).communicate(timeout=120)
    assert b"cannot be written" in out, err.decode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_save_leaves_no_half_checkpoint(tmp_path):
    code = "for i in range(10000): save_checkpoint(out / str(i), first.config, first.params, first.tokenizer)"
    process = run_saver(code, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "1").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.03)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    saved = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(saved) >= 2
    for path in saved:
        load_checkpoint(path)


# Damaged bytes


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "m")


def damaged(folder, name, content):
    """Loads the checkpoint with one file replaced: either it is refused in one line, or it gives the right tree."""
    copy = folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(content)
    try:
        params = load_checkpoint(copy).params
    except ValueError as error:
        assert "\n" not in str(error)
        assert re.search(r"copy|tensor|`\w+", str(error))
        return None
    shapes = {path: leaf.shape for path, leaf in leaves(load_checkpoint(folder).params).items()}
    assert {path: leaf.shape for path, leaf in leaves(params).items()} == shapes
    return params


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 10**6))
def test_a_truncated_file_is_always_refused(tiny_folder, cut):
    content = (tiny_folder / "model.safetensors").read_bytes()
    assert damaged(tiny_folder, "model.safetensors", content[: cut % len(content)]) is None


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_header_is_refused_or_harmless(tiny_folder, place, value):
    content = bytearray((tiny_folder / "model.safetensors").read_bytes())
    content[place % (8 + int.from_bytes(content[:8], "little"))] = value
    damaged(tiny_folder, "model.safetensors", bytes(content))


@settings(max_examples=40, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_config_is_refused_or_harmless(tiny_folder, place, value):
    content = bytearray((tiny_folder / "config.json").read_bytes())
    content[place % len(content)] = value
    damaged(tiny_folder, "config.json", bytes(content))


def test_a_header_that_claims_gigabytes_is_refused_at_once(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path = tmp_path / "model.safetensors"
    for content in (len(header).to_bytes(8, "little") + header, (1 << 62).to_bytes(8, "little") + header):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            tensor_index(tmp_path)
        one_line(error, "model.safetensors", "truncated or damaged", "download it again")


# Single files


def test_strided_arrays_and_scalars_are_written_as_they_read(tmp_path):
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "t": matrix.T,
        "s": matrix[::2, 1:],
        "zero": np.full((), 3.0, np.float32),
        "none": np.zeros((0, 4), np.int8),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"note": "kept"})
    for name, tensor in read_tensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
        assert tensor.shape == tensors[name].shape
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(TypeError, match=r"`tensors\['a'\]` is a list"):
        write_tensors(tmp_path / "y.safetensors", {"a": [1.0]})  # type: ignore[dict-item]


def test_header_tells_bytes_without_reading(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": np.zeros((3, 5), ml_dtypes.bfloat16), "b": np.zeros(7, np.int8)})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.nbytes) for name, info in header.items()} == {"a": ("BF16", 30), "b": ("I8", 7)}
    assert header["a"].file == Path(tmp_path / "x.safetensors")
