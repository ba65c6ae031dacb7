"""Adapters in the layout of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

PEFT names a tensor by the module that it stands beside, `base_model.model.<module>.lora_A.weight`, and has it as torch's layers do:

    linear       lora_A.weight (r, K), lora_B.weight (N, r)
    convolution  lora_A.weight (r, in, *window), lora_B.weight (out, r, 1, ...)
    embedding    lora_embedding_A (r, rows), lora_embedding_B (features, r)
    DoRA         lora_magnitude_vector (N,), of a convolution (1, N, 1, ...)

A parameter that stacks layers or experts is one module each there. PEFT's files say nothing of the numbers of the base, and older
versions of it refuse a configuration with further entries: what is known of the base stands in the header of the tensors' file, which PEFT
does not read.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from qjax.core.specs import ScaleDtype, check_choice
from qjax.disk import write_whole
from qjax.formats.base_sketch import distance, from_text, sketches, to_text
from qjax.formats.safetensors import read_json, read_metadata, read_tensors, write_tensors
from qjax.training import Adapted, Lora
from qjax.training.adapted import check_adapters, check_form

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_BASE = "qjax.base"  # the entry of the header
# The module of each parameter, or of each layer (expert, ...) of a stacked one, in the order of its stacked axes.
Names = Mapping[str, "str | Sequence[str]"]


def save_peft(
    folder: str | os.PathLike[str],
    plan: Mapping[int, Adapted],
    adapters: Mapping[str, Mapping[str, Any]],
    names: Names | None = None,
    *,
    base: Any = None,
    base_model: str = "",
    dtype: Any = None,
) -> None:
    """Writes adapters as PEFT does.

    Args:
      folder: made if it is not there; the two files in it are replaced.
      plan: `tuned.plan(base, *args)` of `tuned = qjax.qlora(fn, policy)`.
      adapters: the trained ones.
      names: the torch module of each parameter's path, `model.layers.0.self_attn.q_proj`; of a stacked parameter one for each layer. What
        is left out is named by its path with dots, without a last `kernel`, `embedding`, `weight` or `w`, and layers by their number.
      base: what they were trained beside: nine numbers of each of its weights that has an adapter go with them, by which `load_peft`
        knows it again, prepacked or on another machine too. None: the files do not say.
      base_model: what PEFT is to load the base from.
      dtype: float32, bfloat16 or float16, by name or as a dtype; None keeps each.

    Raises:
      TypeError: an argument of the wrong kind: no plan, no adapters, names that are no mapping, a base without numbers.
      ValueError: adapters of another plan; names that do not fit; a base that is not the plan's; another `dtype`, or one in which an
        adapter overflows; a mixture that one PEFT configuration cannot say (DoRA, rsLoRA or dropout of some only). Nothing is written.
      NotADirectoryError: `folder` is a file.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, tempfile
      >>> tuned = qjax.qlora(lambda p, x: x @ p["up"]["kernel"], qjax.Policy([qjax.Rule("*", train=qjax.lora(2))]))
      >>> base, x = {"up": {"kernel": jnp.eye(8)}}, jnp.ones((1, 8))
      >>> plan, adapters = tuned.plan(base, x), tuned.init(jax.random.key(0), base, x)
      >>> folder = tempfile.mkdtemp()
      >>> save_peft(folder, plan, adapters, {"up/kernel": "mlp.up_proj"}, base=base)
      >>> sorted(read_tensors(Path(folder) / WEIGHTS_FILE))
      ['base_model.model.mlp.up_proj.lora_A.weight', 'base_model.model.mlp.up_proj.lora_B.weight']

    Source: Hugging Face PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`.
    """
    root = _folder(folder)
    _check_plan(plan)
    if not isinstance(base_model, str):
        raise TypeError(f"`base_model` must be a string, a name or a path for PEFT, got {base_model!r}")
    name = None if dtype is None else _float_name(dtype)
    modules = _modules(plan, names)
    config = json.dumps(_config(plan, modules, base_model), indent=2, sort_keys=True) + "\n"
    _check_arrays(adapters)
    check_adapters(adapters, plan)
    tensors: dict[str, np.ndarray] = {}
    for one in plan.values():
        parts = {part: _stored(a, name, f"{one.leaf.path!r} {part!r}") for part, a in adapters[one.leaf.path].items()}
        for index, module in zip(_indices(one), modules[one.leaf.path], strict=True):
            tensors |= {_PREFIX + module + suffix: a for suffix, a in _to_torch(one, _take(one, parts, index)).items()}
    known = {} if base is None else {_BASE: to_text(sketches(plan, modules, base))}
    root.mkdir(parents=True, exist_ok=True)
    write_tensors(root / WEIGHTS_FILE, tensors, known)
    write_whole(root / CONFIG_FILE, [config.encode()])


def load_peft(
    folder: str | os.PathLike[str], plan: Mapping[int, Adapted], names: Names | None = None, *, base: Any = None
) -> dict[str, dict[str, Any]]:
    """Reads adapters that PEFT or `save_peft` wrote.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      plan: `tuned.plan(base, *args)`: the policy says rank, scaling and kind, and the file has to agree.
      names: as for `save_peft`.
      base: what they are to stand beside. If it was given to `save_peft`, too, it has to be the same, but for its layout and for what
        low-rank part its weights have; else, as in PEFT's own folders, there is nothing to compare it with. None: it is not looked at.

    Returns:
      Adapters for `tuned`, float32.

    Raises:
      FileNotFoundError: a file is missing.
      NotADirectoryError: `folder` is a file.
      TypeError: an argument of the wrong kind.
      ValueError: a damaged file; tensors that no adapter of the plan stands for, or the reverse; another rank, scaling or kind; another
        base.

    Example:
      >>> import jax, jax.numpy as jnp, qjax, tempfile
      >>> tuned = qjax.qlora(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", train=qjax.lora(2))]))
      >>> base, folder = {"w": jnp.eye(8)}, tempfile.mkdtemp()
      >>> plan = tuned.plan(base, jnp.ones((1, 8)))
      >>> save_peft(folder, plan, tuned.init(jax.random.key(0), base, jnp.ones((1, 8))), {"w": "head"}, base=base)
      >>> jax.tree.map(jnp.shape, load_peft(folder, plan, {"w": "head"}, base=base))
      {'w': {'a': (1, 2, 8), 'b': (8, 2)}}
      >>> load_peft(folder, plan, {"w": "head"}, base={"w": 1.5 * jnp.eye(8)})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: `base` is not the one that the adapters in ... were saved with: 1 of 1 leaves differ, 'w' by about ...

    Source: Hugging Face PEFT 0.21, `set_peft_model_state_dict`.
    """
    root = _folder(folder)
    _check_plan(plan)
    modules = _modules(plan, names)
    config, tensors = read_json(root / CONFIG_FILE), read_tensors(root / WEIGHTS_FILE)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`{root / CONFIG_FILE}` has `peft_type` {config.get('peft_type')!r}, and only 'LORA' can be read: train or "
                         "convert to LoRA in PEFT")  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for one in plan.values():
        whole = {name: np.zeros(shape, np.float32) for name, shape in one.shapes.items()}
        for index, module in zip(_indices(one), modules[one.leaf.path], strict=True):
            _check_settings(root, config, one.lora, module)
            for name, a in _from_torch(one, _of_module(root, tensors, one, module)).items():
                _put(one, whole, name, index, a)
        found[one.leaf.path] = {name: jnp.asarray(a) for name, a in whole.items()}
    if tensors:
        known = ", ".join(itertools.islice(itertools.chain(*modules.values()), 3))
        raise ValueError(f"`{root / WEIGHTS_FILE}` holds {min(tensors)!r}, which is no adapter of the policy: widen its rules, or give "
                         f"the parameter's module in `names` (known: {known})")  # fmt: skip
    if base is not None:
        _check_base(root, plan, modules, base)
    return found


def _folder(folder: Any) -> Path:
    """The argument as a path that is a folder, or can become one."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"`folder` must be a path, got {type(folder).__name__}: it comes first, the plan second")
    root = Path(folder)
    there = next((path for path in (root, *root.parents) if path.exists()), root)
    if there.exists() and not there.is_dir():
        raise NotADirectoryError(f"`folder` {str(root)!r} cannot be one, for {str(there)!r} is a file: give another path, that of the "
                                 f"folder which {CONFIG_FILE} lies in")  # fmt: skip
    return root


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, Mapping) or not all(isinstance(one, Adapted) for one in plan.values()):
        raise TypeError(f"`plan` must be tuned.plan(base, *args) of tuned = qjax.qlora(fn, policy), got {type(plan).__name__}")
    if not plan:
        raise ValueError("`plan` is empty: give tuned.plan(base, *args) of tuned = qjax.qlora(fn, policy)")


def _check_arrays(adapters: Any) -> None:
    """Refuses what is no tree of adapters, so that `check_adapters` may compare shapes."""
    check_form(adapters)
    for path, parts in adapters.items():
        for part, a in parts.items():
            if not hasattr(a, "shape") or not hasattr(a, "dtype"):
                raise TypeError(f"`adapters` {path!r} {part!r} must be an array, got {type(a).__name__}: give what .init(...) gave")


def _float_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    check_choice("dtype", name, get_args(ScaleDtype))
    return name


def _stored(a: Any, dtype: str | None, what: str) -> np.ndarray:
    """An adapter's array as it is written."""
    if dtype is None:
        return np.asarray(a)
    stored = jnp.asarray(a).astype(dtype)
    if bool(jnp.any(jnp.isinf(stored) & ~jnp.isinf(a))):
        raise ValueError(f"`dtype` {dtype!r} cannot hold `adapters` {what}, with magnitudes up to {float(jnp.max(jnp.abs(a))):g}: take "
                         "'bfloat16' or 'float32'")  # fmt: skip
    return np.asarray(stored)


def _check_base(root: Path, plan: Mapping[int, Adapted], modules: Mapping[str, list[str]], base: Any) -> None:
    """Refuses another base than that of the folder, if it says of which it is."""
    here, text = sketches(plan, modules, base), read_metadata(root / WEIGHTS_FILE).get(_BASE)
    if text is None:
        return
    there = from_text(text, str(root / WEIGHTS_FILE))
    if here.keys() != there.keys():
        raise ValueError(f"`{root / WEIGHTS_FILE}` has a note on other weights than its adapters stand beside: copy it again, or leave "
                         "`base` out")  # fmt: skip
    apart = {path: max(distance(here[module], there[module]) for module in listed) for path, listed in modules.items()}
    path, others = max(apart, key=lambda path: apart[path]), sum(map(bool, apart.values()))
    if others:
        raise ValueError(f"`base` is not the one that the adapters in `{root}` were saved with: {others} of {len(apart)} leaves differ, "
                         f"{path!r} by about {apart[path]:.2g} times its norm; give that base, which the same parameters, policy and "
                         "data make again, or leave `base` out to have them beside another")  # fmt: skip


def _stacked(one: Adapted) -> list[int]:
    """Which of the kept axes hold layers or experts."""
    return [i for i, n in enumerate(one.own) if n != 1]


def _indices(one: Adapted) -> list[tuple[int, ...]]:
    """Every layer of a parameter, as positions along its stacked axes; one () where it has none."""
    return list(itertools.product(*(range(one.kept[i]) for i in _stacked(one))))


def _modules(plan: Mapping[int, Adapted], names: Names | None) -> dict[str, list[str]]:
    """The modules of every parameter, one a layer."""
    paths = {one.leaf.path for one in plan.values()}
    names = {} if names is None else names
    if not isinstance(names, Mapping):
        raise TypeError(f"`names` must be a mapping from paths to modules such as {{{min(paths)!r}: 'model.up'}}, or None, got {names!r}")
    for path in names:
        if path not in paths:
            raise ValueError(f"`names` has {path!r}, which has no adapter: those that have are {', '.join(sorted(paths)[:3])}; leave it "
                             "out, or give it one by a rule with qjax.lora(...)")  # fmt: skip
    modules = {}
    for one in plan.values():
        indices, given = _indices(one), names.get(one.leaf.path)
        if given is None:
            words = one.leaf.path.split("/")
            stem = ".".join(words[:-1] if len(words) > 1 and words[-1] in ("kernel", "embedding", "weight", "w") else words)
            given = [".".join([stem, *map(str, index)]) for index in indices]
        listed = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
        if not all(isinstance(name, str) and name for name in listed):
            raise TypeError(f"`names[{one.leaf.path!r}]` must be a module such as 'model.up', or a list of them, got {given!r}")
        if len(listed) != len(indices):
            raise ValueError(f"`names[{one.leaf.path!r}]` has {len(listed)} modules, and the parameter stacks {len(indices)}: one each")
        modules[one.leaf.path] = listed
    every = list(itertools.chain(*modules.values()))
    if len(set(every)) < len(every):
        twice = next(name for name in every if every.count(name) > 1)
        raise ValueError(f"`names` gives the module {twice!r} to two parameters: each needs one of its own")
    return modules


def _config(plan: Mapping[int, Adapted], modules: Mapping[str, list[str]], base_model: str) -> dict[str, Any]:
    """adapter_config.json: the first parameter's rank and alpha, patterns for what differs."""
    loras = {module: one.lora for one in plan.values() for module in modules[one.leaf.path]}
    first = next(iter(loras.values()))
    for name in ("rank_stabilized", "dora", "dropout"):
        if len({getattr(each, name) for each in loras.values()}) > 1:
            raise ValueError(f"`plan` has adapters that differ in `{name}`, for which PEFT's configuration has one entry: save them apart")
    return {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": base_model or None, "revision": None, "task_type": None,
        "inference_mode": True, "r": first.rank, "lora_alpha": _alpha(first), "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized, "use_dora": first.dora, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "target_modules": sorted(loras), "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None,
        "rank_pattern": {module: each.rank for module, each in loras.items() if each.rank != first.rank},
        "alpha_pattern": {module: _alpha(each) for module, each in loras.items() if _alpha(each) != _alpha(first)},
    }  # fmt: skip


def _alpha(lora: Lora) -> float:
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _check_settings(root: Path, config: Mapping[str, Any], lora: Lora, module: str) -> None:
    """Refuses a file whose adapters compute something else than the policy's."""
    alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    wanted = {"use_dora": lora.dora, "use_rslora": lora.rank_stabilized}
    got: dict[str, Any] = {name: bool(config.get(name, False)) for name in wanted}
    wanted |= {"rank": lora.rank, "lora_alpha": _alpha(lora)}
    got |= {"rank": _of_pattern(config.get("rank_pattern") or {}, module, config.get("r")), "lora_alpha": alpha}
    for name, value in wanted.items():
        if got[name] != value:
            raise ValueError(f"`{root / CONFIG_FILE}` says `{name}` {got[name]!r} for {module!r}, and the policy {value!r}: change the "
                             "qjax.lora(...) of the rule")  # fmt: skip
    if config.get("bias", "none") != "none":
        raise ValueError(f"`{root / CONFIG_FILE}` trains biases (`bias` {config['bias']!r}), which have no adapter here: train with "
                         "bias='none' in PEFT")  # fmt: skip


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's patterns are ends of module names (or expressions, which are not read)."""
    if not isinstance(pattern, Mapping):
        raise ValueError(f"`{CONFIG_FILE}` has a pattern that is no object, {pattern!r}: copy or download it again")
    return next((value for name, value in pattern.items() if module == name or module.endswith("." + name)), default)


def _suffixes(one: Adapted) -> dict[str, str]:
    if one.looked_up:
        return {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
    names = {"a": ".lora_A.weight", "b": ".lora_B.weight"}
    return names | ({"m": ".lora_magnitude_vector"} if one.lora.dora else {})


def _of_module(root: Path, tensors: dict[str, np.ndarray], one: Adapted, module: str) -> dict[str, np.ndarray]:
    """Takes a module's tensors out of those that are left."""
    found = {}
    for name, suffix in _suffixes(one).items():
        key = _PREFIX + module + suffix
        if key not in tensors:
            near = [other for other in tensors if other.endswith(suffix)][:2]
            raise ValueError(f"`{root / WEIGHTS_FILE}` lacks {key!r}: give the module of {one.leaf.path!r} in `names`, or, if it was saved "
                             "with fewer adapters, put a rule without `train` for that in front"
                             + (f" (it has {', '.join(map(repr, near))})" if near else ""))  # fmt: skip
        a, shape = tensors.pop(key), _torch_shapes(one)[name]
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"`{root / WEIGHTS_FILE}` has {key!r} as {a.dtype}, and adapters are floats: save the trained ones again")
        if a.shape != shape:
            raise ValueError(f"`{root / WEIGHTS_FILE}` has {key!r} of shape {a.shape}, and the parameter wants {shape}: it is of a model "
                             f"of another size, or `names` gives {one.leaf.path!r} the module of another")  # fmt: skip
        found[name] = a.astype(np.float32)
    return found


def _window(one: Adapted) -> tuple[int, ...] | None:
    """The sizes of a convolution's window; None of anything else."""
    if all(site.op != "conv_general_dilated" for site in one.leaf.sites):
        return None
    return tuple(one.leaf.shape[a] for a in one.axes if a != _channels(one))


def _channels(one: Adapted) -> int:
    """The axis of a convolution's input channels: its last contracted one (HWIO), or that in front of its window (OIHW)."""
    contracted = [a + len(one.leaf.shape) for a in one.axes]
    kept = next(i for i in range(len(one.leaf.shape)) if i not in contracted)
    return one.axes[0] if kept == 0 else one.axes[-1]


def _outputs(one: Adapted) -> int:
    return math.prod(n for i, n in enumerate(one.kept) if i not in _stacked(one))


def _torch_shapes(one: Adapted) -> dict[str, tuple[int, ...]]:
    n, k, r, window = _outputs(one), one.inputs, one.lora.rank, _window(one)
    if one.looked_up:
        return {"a": (r, n), "b": (k, r)}
    if window is None:
        return {"a": (r, k), "b": (n, r), "m": (n,)}
    ones = (1,) * len(window)
    return {"a": (r, k // math.prod(window), *window), "b": (n, r, *ones), "m": (1, n, *ones)}


def _to_torch(one: Adapted, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A (r, K), B (N, r) and m (N,) of one layer, as torch has them, by the end of their name."""
    names, shapes, parts = _suffixes(one), _torch_shapes(one), dict(parts)
    if one.looked_up:
        return {names["a"]: parts["b"].T, names["b"]: parts["a"].T}
    if _window(one) is not None:
        parts["a"] = np.moveaxis(parts["a"].reshape(-1, *(one.leaf.shape[a] for a in one.axes)), 1 + one.axes.index(_channels(one)), 1)
    return {names[name]: a.reshape(shapes[name]) for name, a in parts.items()}


def _from_torch(one: Adapted, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_to_torch`."""
    if one.looked_up:
        return {"a": parts["b"].T, "b": parts["a"].T}
    parts, k = dict(parts), one.inputs
    if _window(one) is not None:
        parts["a"] = np.moveaxis(parts["a"], 1, 1 + one.axes.index(_channels(one)))
    two = {"a": parts["a"].reshape(-1, k), "b": parts["b"].reshape(-1, one.lora.rank)}
    return two | ({"m": parts["m"].reshape(-1)} if "m" in parts else {})


def _where(one: Adapted, index: tuple[int, ...]) -> tuple[Any, ...]:
    turns = iter(index)
    return tuple(next(turns) if i in _stacked(one) else slice(None) for i in range(len(one.kept)))


def _take(one: Adapted, parts: Mapping[str, np.ndarray], index: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A (r, K), B (N, r) and m (N,) of one layer."""
    shapes = {"a": (one.lora.rank, one.inputs), "b": (-1, one.lora.rank), "m": (-1,)}
    return {name: a[_where(one, index)].reshape(shapes[name]) for name, a in parts.items()}


def _put(one: Adapted, whole: dict[str, np.ndarray], name: str, index: tuple[int, ...], a: np.ndarray) -> None:
    where = _where(one, index)
    whole[name][where] = a.reshape(whole[name][where].shape)


def llama_modules(paths: Iterator[str] | Sequence[str]) -> dict[str, str]:
    """The torch modules of `qjax.models.Llama`'s parameters, for `names`: `layers_0/mlp/up_proj/kernel` is `model.layers.0.mlp.up_proj`.

    Args:
      paths: of unstacked parameters.

    Returns:
      A module by path.

    Raises:
      TypeError: one path instead of several.
      ValueError: a path that is not of that model.

    >>> llama_modules(["layers_11/self_attn/q_proj/kernel", "lm_head/kernel"])
    {'layers_11/self_attn/q_proj/kernel': 'model.layers.11.self_attn.q_proj', 'lm_head/kernel': 'lm_head'}
    """
    if isinstance(paths, str):
        raise TypeError(f"`paths` must hold paths, such as the adapters or [{paths!r}], got the string {paths!r}")
    found = {}
    for path in paths:
        words = path.split("/")[:-1]
        if not words:
            raise ValueError(f"`paths` has {path!r}, which is no parameter of qjax.models.Llama: write {{{path!r}: module}} for `names`")
        head, _, number = words[0].partition("_")
        words = ["layers", number, *words[1:]] if head == "layers" and number.isdigit() else words
        found[path] = ".".join(words if words[0] == "lm_head" else ["model", *words])
    return found
