"""`prepack`: weights in the layout that the kernels of a machine read, laid out once, when they are loaded."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer

from qjax.core import QTensor
from qjax.core.specs import check_flag
from qjax.program import Leaf, Program, ProgramCache, Site, check_function, shared_inputs, split_arguments
from qjax.runtime.fused import lay_out_together, why_not_together
from qjax.runtime.installed import runtime_of
from qjax.runtime.kernels import Kernel, Layout, Runtime, choose
from qjax.runtime.layouts import laid_out
from qjax.runtime.request import request_of


def prepack(
    fn: Callable[..., Any],
    *,
    kernel: str | None = None,
    device: Any = None,
    kernels: Sequence[Kernel] | None = None,
    tuned: str | os.PathLike[str] | None = None,
    donate: bool = False,
    fuse: bool = False,
) -> Callable[..., Any]:
    """Transforms `fn` into a function of the same arguments that gives its parameters laid out for the kernels that will run.

    Do it once, after `qjax.load`, and call `qjax.quantized(fn)` with what it returns: kernels with a layout of their own run no other
    weights. A leaf stays as it is where no kernel wants it laid out, where its products want it in different layouts, where something
    else than products and lookups reads it, and where it is spread over several devices. What is laid out is still a `QTensor`:
    it can be scanned over, differentiated, dequantized and saved, in the format that it came from.

    Args:
      fn: as for `qjax.quantized`.
      kernel: as for `qjax.quantized`.
      device: as for `qjax.quantized`.
      kernels: as for `qjax.quantized`.
      tuned: as for `qjax.quantized`.
      donate: free each leaf's old codes as soon as the new ones are there, so that never more than one weight is in memory twice.
      fuse: lay weights of one format that meet the same input (q, k and v; gate and up) out behind one another, so that one product
        runs for all of them; `qjax.runtime.fused_sites` says which. They share their arrays: placing the tree anew makes a
        copy for each, and the gradient of their scales comes with the first. Where a product is of few rows and a small weight, it saves
        most of what the other calls cost.

    Returns:
      A function of (params, *args), arrays or, except for the parameters, shapes, that returns the parameters.

    Raises:
      TypeError: `fn` is no function; `donate` or `fuse` is no bool.
      ValueError: as `qjax.quantized`.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: x @ p["w"]
      >>> params = {"w": qjax.core.quantize(jnp.ones((64, 64)), qjax.int4(), axes=(0,))}
      >>> laid = prepack(fn, kernels=[])(params, jnp.ones((1, 64)))  # nothing to lay it out for
      >>> laid["w"] is params["w"]
      True
    """
    check_function(fn)
    for name, flag in (("donate", donate), ("fuse", fuse)):
        check_flag(name, flag)
    programs = ProgramCache(fn)

    @functools.wraps(fn)
    def call(params: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_of(kernel, device, kernels, tuned)
        arguments = split_arguments(params, args, kwargs)
        program = programs(arguments)
        values = [*arguments.params]
        layouts = {leaf.index: layout_for(leaf, q, runtime) for leaf in program.leaves if isinstance(q := values[leaf.index], QTensor)}
        for group in groups_of(program, values, layouts) if fuse else ():
            old, layout = [values[leaf.index] for leaf in group], layouts[group[0].index]
            if not isinstance(layout, str):
                laid = lay_out_together(group, old, layout, len(_leading(group[0].sites[0])[0]))
                for leaf, q, new in zip(group, old, laid, strict=True):
                    values[leaf.index], layouts[leaf.index] = new, "laid out with others"
                    if donate:
                        _free(q)
        for leaf in program.leaves:
            q, found = values[leaf.index], layouts.get(leaf.index, "")
            if not isinstance(found, str):
                values[leaf.index] = _lay_out(q.plain(), found, leaf)
                if donate:
                    _free(q)
        tree, _, _ = arguments.rebuild(values, [*arguments.inputs])
        return tree

    return call


def groups_of(program: Program, values: Sequence[Any], layouts: Mapping[int, Layout | str]) -> list[list[Leaf]]:
    """The leaves of which several are multiplied together, in the order in which the program reaches them.

    Args:
      program: the traced function.
      values: its parameters.
      layouts: of each packed leaf, by index, or why it keeps its own.
    """
    wanted = {index for index, layout in layouts.items() if not isinstance(layout, str)}
    alone = {leaf.sites[0].key: leaf for leaf in program.leaves if len(leaf.sites) == 1 and leaf.index in wanted}
    groups: list[list[Leaf]] = []
    for shared in shared_inputs(program, exactly=True):
        mine: list[list[Leaf]] = []
        for leaf in (alone[site.key] for site in shared if site.key in alone):
            fits = (g for g in mine if layouts[g[0].index] == layouts[leaf.index])
            q = values[leaf.index]
            group = next((g for g in fits if not why_not_together(leaf, q, g[0], values[g[0].index])), None)
            if group is None:
                mine.append([leaf])
            else:
                group.append(leaf)
        groups += [group for group in mine if len(group) > 1]
    return groups


def layout_for(leaf: Leaf, q: QTensor, runtime: Runtime) -> Layout | str:
    """The layout that the kernels want which run a leaf's products; why it keeps its own, where it does."""
    if not runtime.kernels:
        return "no kernels are installed for this platform"
    if leaf.consumers:
        return f"it is also read by {', '.join(leaf.consumers)}"
    arrays = [a for a in jax.tree.leaves(q) if isinstance(a, jax.Array) and not isinstance(a, Tracer)]
    if any(not a.sharding.is_fully_replicated for a in arrays):
        return "it is spread over several devices"
    wanted: dict[Layout, None] = {}
    for site in leaf.sites:
        if site.op == "gather":
            continue
        found = _layout_of_site(site, q, runtime)
        if isinstance(found, str):
            return found
        wanted[found] = None
    if len(wanted) != 1:
        return "its products want it in different layouts" if wanted else "it is only looked up in"
    (layout,) = wanted
    if any(site.op == "gather" for site in leaf.sites) and layout.rows is None:
        return "rows are looked up in it, too"
    return layout


def _layout_of_site(site: Site, q: QTensor, runtime: Runtime) -> Layout | str:
    if site.view.fixed or site.view.partial:
        return "parts of it are taken by an index"
    bare = dataclasses.replace(q, adapter_left=None, adapter_right=None)
    request = request_of(site, bare, runtime.device, q.dtype, q.dtype)
    if isinstance(request, str):
        return request
    kept = [i for i in range(q.ndim) if i - q.ndim not in q.axes]
    stacked, parts = _leading(site)
    if kept[: len(stacked) + len(parts)] != [*stacked, *parts]:
        return "its layers and experts are not the first axes of the stored weight"
    kernel = choose(request, runtime.kernels, runtime.force, where=site.path, tuned=runtime.tuned).kernel
    if kernel is None:
        return "no kernel takes its products"
    return f"{kernel.name} reads codes as they are stored" if kernel.layout is None else kernel.layout


def _leading(site: Site) -> tuple[list[int], list[int]]:
    """The parameter's axes that scans take apart, and those that hold parts of one product."""
    stacked = [axis for axis, _ in site.view.scans]
    dims = [0] if site.op == "ragged_dot_general" else [w for w, _ in site.batch]
    parts = [atom.axis for w in dims for atom in site.view.dims[w]]
    return stacked, list(dict.fromkeys(parts))


def _lay_out(q: QTensor, layout: Layout, leaf: Leaf) -> QTensor:
    site = next(site for site in leaf.sites if site.op != "gather")
    stacked, parts = _leading(site)
    return _jitted(q, layout, len(parts), len(stacked))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _jitted(q: QTensor, layout: Layout, parts: int, stacked: int) -> QTensor:
    return laid_out(q, layout, parts, stacked)


def _free(q: QTensor) -> None:
    for array in (q.codes, q.scale, q.zero_point):
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            array.delete()
