"""Float checkpoints in the Hugging Face layout: config.json, safetensors, tokenizer.json.

Reading is a comparison of two lists made before any data is touched: the tensors the config implies and the tensors the
files hold. Whatever is missing, surplus, of another shape or dtype is refused by name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from qjax.disk import flush_to_disk
from qjax.formats.llama_config import LlamaConfig, model_kind
from qjax.formats.safetensors import (
    FLOAT_DTYPES,
    SINGLE_FILE,
    TensorInfo,
    iterate_tensors,
    read_json,
    tensor_index,
    write_tensors,
)

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"

Params = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A float model as read from a folder.

    Attributes:
      config: sizes and constants.
      params: nested dict of jax arrays, the parameters of `qjax.models.llama.Llama`; linear kernels are (in, out).
      tokenizer: the tokenizer, or None when the folder has no tokenizer.json.
      model_kind: "llama" or "mistral" (the same mathematics).
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer | None
    model_kind: str


@dataclass(frozen=True)
class Placement:
    """How one stored tensor becomes one parameter.

    Attributes:
      path: keys in the parameter tree.
      shape: shape in the file; torch keeps a linear weight as (out, in).
      transpose: whether the parameter is the transposed tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    transpose: bool


def load_checkpoint(folder: str | os.PathLike[str], param_dtype: Any = jnp.float32) -> Checkpoint:
    """Reads a float checkpoint of a Llama (or a Mistral without a sliding window).

    Args:
      folder: holds config.json, model.safetensors (or shards with their index) and mostly tokenizer.json.
      param_dtype: float32, bfloat16 or float16, to which every tensor is cast. float32 holds the stored bfloat16 and
        float16 numbers exactly; a narrower type than the stored one rounds them.

    Returns:
      Config, parameters, tokenizer and kind.

    Raises:
      FileNotFoundError: the folder or a file of it is missing.
      ValueError: a damaged file; an architecture or option that is not supported; a tensor that is missing, unexpected,
        or of a wrong shape or dtype; a tokenizer with more tokens than the embedding has rows.

    Example:
      >>> from qjax.models.shipped import books_llama_folder
      >>> checkpoint = load_checkpoint(books_llama_folder())
      >>> checkpoint.params["layers_0"]["mlp"]["gate_proj"]["kernel"].shape
      (256, 768)

    Source: the layout of transformers' `LlamaForCausalLM.save_pretrained`.
    """
    root, dtype = Path(folder), _param_dtype(param_dtype)
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` {str(root)!r} is not a folder: give the folder of a checkpoint")
    config, kind = _load_config(root / CONFIG_FILE)
    index = tensor_index(root)
    placements = _checked_placements(root, config, index)
    params: Params = {}
    for name, tensor in iterate_tensors({name: index[name] for name in placements}):
        placement = placements[name]
        _insert(params, placement.path, _to_param(tensor, placement.transpose, dtype))
    _check_stored_head(config, index, params)
    return Checkpoint(config, params, load_tokenizer(root, config), kind)


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    dtype: Any = None,
) -> None:
    """Writes a float checkpoint that `load_checkpoint` and transformers read.

    The folder is written under a temporary name beside `folder` and renamed when all of it is on the disk: a save that
    fails leaves nothing behind, and no reader ever sees half of one.

    Args:
      folder: the folder to make; it must not exist, or be empty.
      config: sizes and constants.
      params: parameters as `load_checkpoint` gives them (one entry a layer, not stacked).
      tokenizer: written as tokenizer.json if given.
      dtype: float32, bfloat16 or float16 for all tensors; None keeps every parameter's own.

    Raises:
      FileExistsError: `folder` holds something already.
      ValueError: a parameter is missing, unexpected, of a wrong shape, not a float, or not finite in `dtype`.
    """
    target, wanted = Path(folder), None if dtype is None else _param_dtype(dtype)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"`folder` {str(target)!r} already holds something: give a new name, or remove it first")
    tensors = _to_tensors(config, params, wanted)
    widest = max((tensor.dtype for tensor in tensors.values()), key=lambda d: (d.itemsize, d.name))
    values = config.to_hf() | {"torch_dtype": widest.name}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        os.chmod(temporary, 0o755)
        write_tensors(temporary / SINGLE_FILE, tensors)
        _write_text(temporary / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
        if tokenizer is not None:
            _write_text(temporary / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
        flush_to_disk(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_to_disk(target.parent)


def load_tokenizer(folder: str | os.PathLike[str], config: LlamaConfig | None = None) -> Tokenizer | None:
    """Reads tokenizer.json.

    Args:
      folder: a checkpoint's folder.
      config: if given, the tokenizer must not have more tokens than the embedding has rows.

    Returns:
      The tokenizer, or None if the folder has none.

    Raises:
      ValueError: the file is damaged, or too large for the embedding.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        return None
    read_json(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers package raises the bare class, and nothing narrower
            raise
        message = " ".join(str(error).split())
        raise ValueError(f"`{path}` is not a tokenizer ({message}): copy or download it again") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if config is not None and size > config.vocab_size:
        raise ValueError(
            f"`{path}` has {size} tokens but `vocab_size` is {config.vocab_size}: use the tokenizer of this checkpoint"
        )
    return tokenizer


def llama_placements(config: LlamaConfig) -> dict[str, Placement]:
    """Names every tensor of a Llama checkpoint, with its place in the parameter tree.

    Args:
      config: sizes and constants.

    Returns:
      A Placement by tensor name, in the order of the computation.
    """
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linear = {
        "self_attn": {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width)}
        | {"o_proj": (width, queries)},
        "mlp": {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)},
    }
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    placements = {_EMBEDDING: Placement(("embed_tokens", "embedding"), (config.vocab_size, width), False)}
    for i in range(config.num_hidden_layers):
        stored, layer = f"model.layers.{i}", f"layers_{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            placements[f"{stored}.{norm}.weight"] = Placement((layer, norm, "scale"), (width,), False)
        for part, shapes in linear.items():
            for name, shape in shapes.items():
                prefix, path = f"{stored}.{part}.{name}", (layer, part, name)
                placements[f"{prefix}.weight"] = Placement((*path, "kernel"), shape, True)
                if biased[part]:
                    placements[f"{prefix}.bias"] = Placement((*path, "bias"), shape[:1], False)
    placements["model.norm.weight"] = Placement(("norm", "scale"), (width,), False)
    if not config.tie_word_embeddings:
        placements[_HEAD] = Placement(("lm_head", "kernel"), (config.vocab_size, width), True)
    return placements


def _param_dtype(dtype: Any) -> np.dtype:
    wanted = np.dtype(dtype)
    if wanted not in FLOAT_DTYPES.values():
        known = ", ".join(sorted(d.name for d in FLOAT_DTYPES.values()))
        raise ValueError(f"the dtype of parameters cannot be {wanted.name!r}: use one of {known}")
    return wanted


def _load_config(path: Path) -> tuple[LlamaConfig, str]:
    values = read_json(path)
    try:
        return LlamaConfig.from_hf(values), model_kind(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked_placements(root: Path, config: LlamaConfig, index: Mapping[str, TensorInfo]) -> dict[str, Placement]:
    # Before the list is made: a damaged config may claim a billion layers.
    if config.num_hidden_layers > len(index):
        raise ValueError(
            f"`{root}`: config.json says `num_hidden_layers` {config.num_hidden_layers} but the files hold only "
            f"{len(index)} tensors: correct the config, or download the missing shards"
        )
    placements = llama_placements(config)
    for name, placement in placements.items():
        if name not in index:
            raise ValueError(
                f"`{root}` lacks the tensor {name!r}, which config.json implies: download the checkpoint again"
            )
        _check_tensor(name, index[name], placement.shape)
    for name in index:
        if name not in placements and not _ignorable(name, config):
            raise ValueError(
                f"`{index[name].file}` holds the tensor {name!r}, which config.json does not imply: correct the config "
                "(biases, tied head, number of layers), or remove the tensor"
            )
    return placements


def _check_tensor(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise ValueError(
            f"tensor {name!r} of `{info.file}` has shape {info.shape} where config.json implies {shape}: "
            "use the config of this checkpoint"
        )
    if info.dtype not in FLOAT_DTYPES:
        known = ", ".join(FLOAT_DTYPES)
        raise ValueError(f"tensor {name!r} of `{info.file}` has dtype {info.dtype}: store it as one of {known}")


def _ignorable(name: str, config: LlamaConfig) -> bool:
    # Old exports store the rotary frequencies, which the config gives, and tied ones sometimes the head once more.
    return name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and config.tie_word_embeddings)


def _check_stored_head(config: LlamaConfig, index: Mapping[str, TensorInfo], params: Params) -> None:
    if not (config.tie_word_embeddings and _HEAD in index):
        return
    _check_tensor(_HEAD, index[_HEAD], (config.vocab_size, config.hidden_size))
    embedding = params["embed_tokens"]["embedding"]
    for name, tensor in iterate_tensors({_HEAD: index[_HEAD]}):
        if not np.array_equal(np.asarray(tensor.astype(embedding.dtype)), np.asarray(embedding)):
            raise ValueError(
                f"`{index[_HEAD].file}` holds {name!r} unequal to the embedding though `tie_word_embeddings` is true: "
                "set it to false in config.json"
            )


def _to_param(tensor: np.ndarray, transpose: bool, dtype: np.dtype) -> jax.Array:
    array = (tensor.T if transpose else tensor).astype(dtype, order="C")
    return jnp.array(array)  # a copy: on a CPU jnp.asarray could alias memory that NumPy may write to


def _insert(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _to_tensors(config: LlamaConfig, params: Mapping[str, Any], dtype: np.dtype | None) -> dict[str, np.ndarray]:
    if "layers" in params:
        raise ValueError("`params` holds stacked layers: pass qjax.models.llama.unstack_layers(params)")
    leaves = _flatten(params)
    placements = llama_placements(config)
    expected = {placement.path for placement in placements.values()}
    for path in leaves:
        if path not in expected:
            raise ValueError(
                f"`params` holds {'/'.join(path)!r}, which `config` does not imply: remove it or correct `config`"
            )
    tensors = {}
    for name, placement in placements.items():
        if placement.path not in leaves:
            raise ValueError(
                f"`params` lacks {'/'.join(placement.path)!r}, which `config` implies: add it or correct `config`"
            )
        tensors[name] = _to_tensor(leaves[placement.path], placement, dtype)
    return tensors


def _to_tensor(leaf: Any, placement: Placement, dtype: np.dtype | None) -> np.ndarray:
    path = "/".join(placement.path)
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        raise ValueError(
            f"`params` leaf {path!r} is a {type(leaf).__name__}: only float arrays are saved, dequantize first"
        )
    tensor = np.asarray(leaf).T if placement.transpose else np.asarray(leaf)
    if tensor.dtype not in FLOAT_DTYPES.values():
        raise ValueError(f"`params` leaf {path!r} has dtype {tensor.dtype.name}: cast it to float32 or bfloat16")
    if tensor.shape != placement.shape:
        wanted = placement.shape[::-1] if placement.transpose else placement.shape
        raise ValueError(f"`params` leaf {path!r} has shape {leaf.shape} where `config` implies {wanted}: correct one")
    with np.errstate(over="ignore"):  # an overflow is refused just below
        tensor = tensor if dtype is None else tensor.astype(dtype)
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"`params` leaf {path!r} is not finite as {tensor.dtype.name}: save it as float32, or repair it"
        )
    return tensor


def _flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        path = (*prefix, str(key))
        leaves |= _flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return leaves


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush_to_disk(path)
