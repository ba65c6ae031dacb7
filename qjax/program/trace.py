"""`trace`: a function and example arguments become a program with its parameters and sites named."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from qjax.core import QCache, QTensor
from qjax.program import compat
from qjax.program.caches import InputLeaf, argument_path, input_leaves
from qjax.program.products import Product
from qjax.program.sites import Leaf, Site, discover

# Below this many elements an array that a function closes over is taken for a constant (a mask, a table of frequencies).
CLOSED_OVER_ELEMENTS = 4096


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function: its jaxpr, how its arguments flatten, and where its parameters meet data.

    Attributes:
      jaxpr: the closed jaxpr; its first `len(leaves)` inputs are the parameters' array leaves.
      leaves: one entry for each array leaf of the parameters.
      out_tree: the structure of the result.
      closed_over: shapes of large arrays that the function closed over; they cannot be quantized.
      products: the products of two activations, in data-flow order, by whose names rules pick them.
      input_paths: of every input, parameters first; see `InputLeaf`.
    """

    jaxpr: Any
    leaves: tuple[Leaf, ...]
    out_tree: Any
    closed_over: tuple[tuple[tuple[int, ...], str], ...]
    products: tuple[Product, ...] = ()
    input_paths: tuple[str, ...] = ()

    @functools.cached_property
    def inputs(self) -> tuple[InputLeaf, ...]:
        """Every input, with whether it is a cache."""
        return input_leaves(self.jaxpr, self.input_paths)

    @property
    def caches(self) -> tuple[InputLeaf, ...]:
        """The inputs into which tokens are written and which come back."""
        return tuple(leaf for leaf in self.inputs if not leaf.refusal)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site, in data-flow order."""
        return tuple(sorted((site for leaf in self.leaves for site in leaf.sites), key=lambda site: site.key))

    def __str__(self) -> str:
        from qjax.program.show import program_table

        return program_table(self)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of a call, split into traced arrays and static values.

    Attributes:
      params: array leaves of the parameters, QTensors and QCaches whole.
      inputs: array leaves of the other arguments, likewise.
      key: hashable identity of all that is static: structures, static leaves.
      paths: paths of `params`.
      input_paths: paths of `inputs`, see `InputLeaf`.
      rebuild: puts array leaves back: (params, inputs) -> (params tree, args, kwargs).
    """

    params: list[Any]
    inputs: list[Any]
    key: Hashable
    paths: tuple[str, ...]
    input_paths: tuple[str, ...]
    rebuild: Callable[[Sequence[Any], Sequence[Any]], tuple[Any, tuple[Any, ...], dict[str, Any]]]


def is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def is_packed(x: Any) -> bool:
    return isinstance(x, (QTensor, QCache))


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, QTensor, QCache))


def path_str(path: tuple[Any, ...]) -> str:
    """Writes a tree path as `a/b/0`, without a leading key `params` and the attribute `value` of a box around a leaf.

    Example:
      >>> import jax
      >>> tree = {"params": {"dense": [1.0]}}
      >>> path_str(jax.tree_util.tree_flatten_with_path(tree)[0][0][0])
      'dense/0'
    """
    if len(path) > 1 and path[0] == jax.tree_util.DictKey("params"):
        path = path[1:]
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split_arguments(params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Separates arrays, which are traced, from everything else (numbers, strings, callables), which is static."""
    flat, params_tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    values = [leaf for _, leaf in flat]
    if values and values[0] is params and hasattr(params, "params") and hasattr(params, "report"):
        raise TypeError(f"`params` is a {type(params).__name__}, which is no tree of arrays: pass its parameters, result.params")
    flat_inputs, inputs_tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_packed)
    inputs = [leaf for _, leaf in flat_inputs]
    dynamic = [is_array(v) for v in values], [is_array(v) for v in inputs]
    static = tuple((i, _static_key(v)) for i, v in enumerate((*values, *inputs)) if not is_array(v))

    def merge(original: list[Any], mask: list[bool], arrays: Sequence[Any]) -> list[Any]:
        fresh = iter(arrays)
        return [next(fresh) if m else v for v, m in zip(original, mask, strict=True)]

    # Only the static leaves are kept: a closure over the arrays would hold them alive in every cached program.
    kept = [None if m else v for v, m in zip(values, dynamic[0], strict=True)]
    kept_inputs = [None if m else v for v, m in zip(inputs, dynamic[1], strict=True)]

    def rebuild(new_params: Sequence[Any], new_inputs: Sequence[Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        tree = jax.tree_util.tree_unflatten(params_tree, merge(kept, dynamic[0], new_params))
        new_args, new_kwargs = jax.tree_util.tree_unflatten(inputs_tree, merge(kept_inputs, dynamic[1], new_inputs))
        return tree, new_args, new_kwargs

    return Arguments(
        params=[v for v in values if is_array(v)],
        inputs=[v for v in inputs if is_array(v)],
        key=(params_tree, inputs_tree, static),
        paths=tuple(path_str(path) for path, leaf in flat if is_array(leaf)),
        input_paths=tuple(argument_path(path, path_str(path[2:])) for path, leaf in flat_inputs if is_array(leaf)),
        rebuild=rebuild,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Compares equal only to itself's value: a key for static values that cannot be hashed, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _static_key(value: Any) -> Hashable:
    # True == 1 == 1.0, so the type is part of the key.
    if isinstance(value, float):
        return (float, repr(value))  # 0.0 == -0.0
    return (type(value), value if isinstance(value, Hashable) else _Same(value))


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Returns the aval of an array; of a QTensor or QCache that of the array it stands for."""
    if isinstance(x, QCache):
        window = x.window if isinstance(x.window, jax.ShapeDtypeStruct) else jax.typeof(x.window)
        return compat.abstract(window, x.shape, x.dtype)
    if isinstance(x, QTensor):
        codes = x.codes if isinstance(x.codes, jax.ShapeDtypeStruct) else jax.typeof(x.codes)
        return compat.abstract(codes, x.shape, x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    return compat.abstract(jax.typeof(x))


def _is_module(fn: Any) -> bool:
    """Whether it is a module of Flax, Linen or NNX, or a class of them: such can be called, but not with parameters."""
    kind = fn if isinstance(fn, type) else type(fn)
    return any(base.__name__ == "Module" and base.__module__.partition(".")[0] == "flax" for base in kind.__mro__)



_OF_MODULES = ("use the verb of the same name in qjax.linen or qjax.nnx, or give model.apply of a Linen module, qjax.nnx.function(model) "
               "of an NNX one")  # fmt: skip


def check_function(fn: Any, of_modules: str = _OF_MODULES) -> None:
    """Refuses what cannot be called with parameters; `of_modules` is what to do with a module instead."""
    if _is_module(fn):
        name = fn.__name__ if isinstance(fn, type) else type(fn).__name__
        raise TypeError(f"`fn` must be a function of (params, *args), got the module {name}: {of_modules}")
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of (params, *args), got {type(fn).__name__}: for a module see qjax.linen and qjax.nnx")


def trace_arguments(fn: Callable[..., Any], arguments: Arguments) -> Program:
    """Traces `fn` on the avals of split arguments."""
    check_function(fn)
    n_params = len(arguments.params)

    def flat_fn(*leaves: Any) -> Any:
        params, args, kwargs = arguments.rebuild(leaves[:n_params], leaves[n_params:])
        return fn(params, *args, **kwargs)

    avals = [abstract(x) for x in (*arguments.params, *arguments.inputs)]
    jaxpr, out_shape = jax.make_jaxpr(flat_fn, return_shape=True)(*avals)
    leaves, products = discover(
        jaxpr, arguments.paths, [a.shape for a in avals[:n_params]], [a.dtype for a in avals[:n_params]]
    )
    large = tuple(
        (tuple(c.shape), str(c.dtype))
        for c in compat.constants(jaxpr)
        if math.prod(getattr(c, "shape", ())) >= CLOSED_OVER_ELEMENTS
    )
    paths = (*arguments.paths, *arguments.input_paths)
    return Program(jaxpr, leaves, jax.tree_util.tree_structure(out_shape), large, products, paths)


def trace(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Program:
    """Traces `fn(params, *args, **kwargs)` and finds every place where a parameter meets data.

    Arrays (also `jax.ShapeDtypeStruct`) are traced; all other leaves of the arguments are static. No number is computed.

    Args:
      fn: any JAX function whose first argument is the tree of parameters.
      params: a tree of arrays, shapes or `QTensor`s.
      *args: further arguments.
      **kwargs: keyword arguments.

    Returns:
      A `Program`; `print` it for a table.

    Example:
      >>> import jax.numpy as jnp
      >>> program = trace(lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.ones((8, 3))}, jnp.ones((2, 8)))
      >>> [(site.path, site.op, site.contracted) for site in program.sites]
      [('w', 'dot_general', (0,))]
    """
    return trace_arguments(fn, split_arguments(params, args, kwargs))


class ProgramCache:
    """Traces one function, remembering the last few programs by shapes, structure and settings.

    A program whose constants are tracers (the function closes over a traced value) belongs to one trace only
    and is never remembered.
    """

    def __init__(self, fn: Callable[..., Any], size: int = 16):
        self.fn, self.size = fn, size
        self._programs: dict[Hashable, Program] = {}

    def __call__(self, arguments: Arguments) -> Program:
        avals = tuple(map(abstract, (*arguments.params, *arguments.inputs)))
        key = (arguments.key, tuple((a, a.weak_type) for a in avals), compat.trace_context())
        program = self._programs.pop(key, None)
        if program is None:
            program = trace_arguments(self.fn, arguments)
            if any(isinstance(c, Tracer) for c in compat.constants(program.jaxpr)):
                return program
        self._programs[key] = program
        while len(self._programs) > self.size:
            del self._programs[next(iter(self._programs))]
        return program
