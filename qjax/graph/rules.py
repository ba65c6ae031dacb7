"""Which primitive demands what of the labels of its operands and results.

A primitive without an entry may carry no scale at all, so what is not known is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qjax.graph.labels import Place, Reshape, Window
from qjax.graph.relations import Equal, Fixed, Lowering, Product, Relation, Term, free_values
from qjax.program.flatten import FlatEqn, Graph

# Results of these are their operand to a power: so is their scale.
POWERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "square": lambda _: 2.0,
    "sqrt": lambda _: 0.5,
    "rsqrt": lambda _: -0.5,
    "integer_pow": lambda params: float(params["y"]),
}


def relations(graph: Graph) -> list[Relation]:
    """Returns what the equations of a flattened program demand.

    Args:
      graph: from `flatten`, loops opened once.

    Returns:
      The relations, in the order of the equations; those of a stack and the layer taken of it last.
    """
    low = Lowering(graph, free_values(graph))
    return [*(relation for eqn in graph.eqns for relation in of_equation(low, eqn)), *of_layers(graph)]


def of_layers(graph: Graph) -> list[Relation]:
    """Returns what every stack and the layer taken of it demand."""
    out: list[Relation] = []
    for var, sliced in graph.sliced.items():
        parent = graph.avals[sliced.parent].shape
        layer = Place(len(parent) - 1, (None, *range(len(parent) - 1)), tuple(parent))
        out.append(Equal("scan", (Term(var), Term(sliced.parent, (layer,)))))
    return out


def of_equation(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    """Returns what one equation demands; of one that is not known, that nothing changes."""
    fixed: list[Relation] = [Fixed(eqn.name, (*eqn.inputs, *eqn.outputs))]
    if eqn.eqn is None or eqn.name not in RULES or not low.as_traced(eqn):
        return fixed
    return RULES[eqn.name](low, eqn) or fixed


def _elementwise_product(low: Lowering, eqn: FlatEqn, out: Any, a: Any, b: Any) -> list[Relation]:
    rank = len(low.shape(eqn.outputs[0]))
    return [Product(eqn.name, (low.elementwise(out, rank), low.elementwise(a, rank), low.elementwise(b, rank)))]


def _mul(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _elementwise_product(low, eqn, eqn.outputs[0], *eqn.inputs)


def _div(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _elementwise_product(low, eqn, eqn.inputs[0], eqn.outputs[0], eqn.inputs[1])


def _same(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    rank = len(low.shape(eqn.outputs[0]))
    return [low.equal(eqn.name, *(low.elementwise(a, rank) for a in (*eqn.outputs, *eqn.inputs)))]


def _select(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    rank = len(low.shape(eqn.outputs[0]))
    cases = (eqn.outputs[0], *eqn.inputs[1:])
    return [low.equal(eqn.name, *(low.elementwise(a, rank) for a in cases)), Fixed(eqn.name, (eqn.inputs[0],))]


def _compare(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    # Both sides scaled alike by a positive number compare as before, and so does either with zero.
    rank = len(low.shape(eqn.outputs[0]))
    return [low.equal(eqn.name, *(low.elementwise(a, rank) for a in eqn.inputs)), Fixed(eqn.name, eqn.outputs)]


def _power(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    power = POWERS[eqn.name](eqn.eqn.params)
    rank = len(low.shape(eqn.outputs[0]))
    if power == 0:
        return []
    return [Equal(eqn.name, (low.elementwise(eqn.outputs[0], rank), low.elementwise(eqn.inputs[0], rank, power)))]


def _reduce(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    out, axes = eqn.outputs[0], eqn.eqn.params["axes"]
    rank = len(low.shape(out))
    places = iter(range(rank))
    dims = [None if i in axes else next(places) for i in range(len(low.shape(eqn.inputs[0])))]
    return [low.equal(eqn.name, Term(out), low.placed(eqn.inputs[0], rank, dims))]


def _along(low: Lowering, eqn: FlatEqn, dims: Sequence[int], atoms: Sequence[Any]) -> list[Relation]:
    """The atoms carry the same scale, and only one along `dims`, where they may differ in size."""
    rank = len(low.shape(atoms[0]))
    places = [None if i in dims else i for i in range(rank)]
    return [low.equal(eqn.name, *(low.placed(a, rank, places) for a in atoms))]


def _cumulative(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _along(low, eqn, (eqn.eqn.params["axis"],), (eqn.outputs[0], eqn.inputs[0]))


def _window(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    params = eqn.eqn.params
    fields = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    still = [tuple(sides) == (0, 0) and all(params[f][i] == 1 for f in fields) for i, sides in enumerate(params["padding"])]
    return _along(low, eqn, [i for i, s in enumerate(still) if not s], (eqn.outputs[0], eqn.inputs[0]))


def _transpose(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    permutation = eqn.eqn.params["permutation"]
    return [low.equal(eqn.name, low.placed(eqn.outputs[0], len(permutation), permutation), Term(eqn.inputs[0]))]


def _reshape(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    if eqn.name == "reshape" and eqn.eqn.params.get("dimensions") is not None:
        return []
    step = Reshape(low.shape(eqn.inputs[0]), low.shape(eqn.outputs[0]))
    return [low.equal(eqn.name, Term(eqn.outputs[0]), Term(eqn.inputs[0], (step,)))]


def _broadcast(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    rank, dims = len(low.shape(eqn.outputs[0])), eqn.eqn.params["broadcast_dimensions"]
    return [low.equal(eqn.name, Term(eqn.outputs[0]), low.placed(eqn.inputs[0], rank, dims))]


def _tile(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    repeated = [i for i, n in enumerate(eqn.eqn.params["reps"]) if n != 1]
    return _along(low, eqn, repeated, (eqn.outputs[0], eqn.inputs[0]))


def _flip(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    shape, flipped = low.shape(eqn.inputs[0]), eqn.eqn.params["dimensions"]
    backwards = Window(shape, tuple((n - 1, None, -1) if i in flipped else (0, n, 1) for i, n in enumerate(shape)))
    return [low.equal(eqn.name, Term(eqn.outputs[0]), Term(eqn.inputs[0], (backwards,)))]


def _slice(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    p, shape = eqn.eqn.params, low.shape(eqn.inputs[0])
    parts = zip(p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(shape), strict=True)
    return [low.equal(eqn.name, Term(eqn.outputs[0]), Term(eqn.inputs[0], (Window(shape, tuple(parts)),)))]


def _pieces(low: Lowering, eqn: FlatEqn, whole: Any, parts: Sequence[Any], axis: int) -> list[Relation]:
    shape, start, out = low.shape(whole), 0, []
    for part in parts:
        stop = start + low.shape(part)[axis]
        window = Window(shape, tuple((start, stop, 1) if i == axis else (0, n, 1) for i, n in enumerate(shape)))
        out.append(low.equal(eqn.name, Term(whole, (window,)), Term(part)))
        start = stop
    return out


def _split(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _pieces(low, eqn, eqn.inputs[0], eqn.outputs, eqn.eqn.params["axis"])


def _concatenate(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _pieces(low, eqn, eqn.outputs[0], eqn.inputs, eqn.eqn.params["dimension"])


def _stack(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    shape, axis, out = low.shape(eqn.outputs[0]), eqn.eqn.params["axis"], []
    for at, atom in enumerate(eqn.inputs):
        one = tuple((at, at + 1, 1) if i == axis else (0, n, 1) for i, n in enumerate(shape))
        flat = Reshape(tuple(1 if i == axis else n for i, n in enumerate(shape)), low.shape(atom))
        out.append(low.equal(eqn.name, Term(eqn.outputs[0], (Window(shape, one), flat)), Term(atom)))
    return out


def _pad(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    if not low.is_free(eqn.inputs[1]):
        return []
    grown = [i for i, sides in enumerate(eqn.eqn.params["padding_config"]) if tuple(sides) != (0, 0, 0)]
    return _along(low, eqn, grown, (eqn.outputs[0], eqn.inputs[0]))


def _dynamic_slice(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    out, operand = eqn.outputs[0], eqn.inputs[0]
    cut = [i for i, (n, m) in enumerate(zip(low.shape(operand), low.shape(out), strict=True)) if n != m]
    return [*_along(low, eqn, cut, (out, operand)), Fixed(eqn.name, eqn.inputs[1:])]


def _dynamic_update_slice(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    operand, update = eqn.inputs[:2]
    cut = [i for i, (n, m) in enumerate(zip(low.shape(operand), low.shape(update), strict=True)) if n != m]
    return [*_along(low, eqn, cut, (eqn.outputs[0], operand, update)), Fixed(eqn.name, eqn.inputs[2:])]


def _gather(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    """Dims that are taken whole pass their scale on; along the others there is one."""
    p, (operand, indices), out = eqn.eqn.params, eqn.inputs, eqn.outputs[0]
    if not low.may_fill(p.get("fill_value")):
        return []
    dims, shape = p["dimension_numbers"], low.shape(operand)
    offsets, places = iter(dims.offset_dims), []
    for i, n in enumerate(shape):
        gone = i in dims.collapsed_slice_dims or i in dims.operand_batching_dims
        place = None if gone else next(offsets)
        places.append(place if p["slice_sizes"][i] == n and i not in dims.start_index_map else None)
    rank = len(low.shape(out))
    kept = [i if i in places else None for i in range(rank)]
    return [low.equal(eqn.name, low.placed(out, rank, kept), low.placed(operand, rank, places)), Fixed(eqn.name, (indices,))]


def _scatter(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    operand, indices, updates = eqn.inputs
    dims, shape, small = eqn.eqn.params["dimension_numbers"], low.shape(operand), low.shape(updates)
    windows = [i for i in range(len(shape)) if i not in dims.inserted_window_dims and i not in dims.operand_batching_dims]
    paired = zip(dims.update_window_dims, windows, strict=True)
    kept = {u: i for u, i in paired if i not in dims.scatter_dims_to_operand_dims and small[u] == shape[i]}
    whole = [i if i in kept.values() else None for i in range(len(shape))]
    terms = [low.placed(a, len(shape), whole) for a in (eqn.outputs[0], operand)]
    terms.append(low.placed(updates, len(shape), [kept.get(u) for u in range(len(small))]))
    return [low.equal(eqn.name, *terms), Fixed(eqn.name, (indices,))]


def _contraction(low: Lowering, eqn: FlatEqn, numbers: Any, grouped: Sequence[int] = ()) -> list[Relation]:
    """Joint space: batch, kept dims of either side, contracted dims; `grouped` dims of the right side take one scale."""
    (contract, batch), out = numbers, eqn.outputs[0]
    rank = len(low.shape(out))
    sides, free = [], len(batch[0])
    for side, atom in enumerate(eqn.inputs[:2]):
        dims: list[int | None] = []
        for i in range(len(low.shape(atom))):
            if i in batch[side]:
                dims.append(list(batch[side]).index(i))
            elif i in contract[side]:
                dims.append(rank + list(contract[side]).index(i))
            elif side and i in grouped:
                dims.append(None)
            else:
                dims.append(free)
                free += 1
        sides.append(low.placed(atom, rank + len(contract[0]), dims))
    return [Product(eqn.name, (low.placed(out, rank + len(contract[0]), range(rank)), sides[0], sides[1]))]


def _dot(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    return _contraction(low, eqn, eqn.eqn.params["dimension_numbers"])


def _ragged_dot(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    dims = eqn.eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), ragged = dims.dot_dimension_numbers, dims.lhs_ragged_dimensions[0]
    if ragged in contract[0] or ragged in batch[0]:
        return []
    found = _contraction(low, eqn, dims.dot_dimension_numbers, dims.rhs_group_dimensions)
    return [*found, Fixed(eqn.name, eqn.inputs[2:])]


def _conv(low: Lowering, eqn: FlatEqn) -> list[Relation]:
    """Joint space: group, kept channel within it, contracted channel; along everything else there is one scale."""
    p, (x, w), out = eqn.eqn.params, eqn.inputs, eqn.outputs[0]
    if p["batch_group_count"] != 1:
        return []
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    (keep, inside), shape = numbers.rhs_spec[:2], low.shape(w)
    kept, contracted = shape[keep] // groups, shape[inside]

    def channels(atom: Any, dims: Sequence[int], split: tuple[int, ...], places: tuple[int, ...]) -> Term:
        full = low.shape(atom)
        pick = Place(len(dims), tuple(list(dims).index(i) if i in dims else None for i in range(len(full))), full)
        return Term(atom, (pick, Reshape(tuple(full[i] for i in dims), split), Place(3, places, split)))

    y = channels(out, [numbers.out_spec[1]], (groups, kept), (0, 1))
    x = channels(x, [numbers.lhs_spec[1]], (groups, contracted), (0, 2))
    return [Product(eqn.name, (y, x, channels(w, [keep, inside], (groups, kept, contracted), (0, 1, 2))))]


Rule = Callable[[Lowering, FlatEqn], list[Relation]]

RULES: dict[str, Rule] = {
    **dict.fromkeys(("neg", "abs", "copy", "copy_p", "convert_element_type", "reduce_precision", "stop_gradient", "name"), _same),
    **dict.fromkeys(("pvary", "pbroadcast", "sharding_constraint"), _same),
    **dict.fromkeys(("add", "sub", "add_any", "max", "min", "clamp"), _same),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("cumsum", "cummax", "cummin"), _cumulative),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window),
    **dict.fromkeys(("eq", "ne", "ge", "gt", "le", "lt"), _compare),
    **dict.fromkeys(("scatter", "scatter-add"), _scatter),
    **dict.fromkeys(("reshape", "squeeze"), _reshape),
    **dict.fromkeys(POWERS, _power),
    "mul": _mul,
    "div": _div,
    "select_n": _select,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "rev": _flip,
    "slice": _slice,
    "split": _split,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
}
