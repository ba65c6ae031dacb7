"""What training does inside of a program: rounds weights, the activations of sites, the operands of products, and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.observe import scan_lengths
from qjax.core import ActSpec, QTensor
from qjax.graph.batch_norm_folds import scaled, unscaled
from qjax.policy import ProductChoice
from qjax.program import Interpreter, Key, Packed, Product, Site, compat, materialize
from qjax.runtime.integer import conv_axes, product, why_no_product
from qjax.runtime.products import rotated_pair
from qjax.runtime.products import shared_axes as product_axes
from qjax.runtime.rotation import rotate_axes
from qjax.runtime.select import column_axes, shared_axes
from qjax.training.estimator import Learned, Moment, TracksRanges
from qjax.training.fake_cache import FakeCache, fake_cache
from qjax.training.gradients import rounded_gradient
from qjax.training.planned import Planned, Trained
from qjax.training.qat import QAT, training_of
from qjax.training.side_state import keys_for, of_leaf, of_site
from qjax.training.state import LEAST, Quant, moment_of
from qjax.training.straight_through import straight_through_activation, straight_through_at

_SIDES = ("left", "right")


def rounded_weight(w: Any, trained: Trained, quant: Quant, factor: jax.Array | None = None) -> jax.Array:
    """A fake-quantized weight; with an on-line rotation it is rounded where it is rotated, with the `factor` of a batch norm folded."""
    w, rotation = jnp.asarray(w), trained.rotation
    given = w if factor is None else scaled(w, factor)
    train, learned = trained.train, quant.get("weights", {}).get(trained.leaf.path, {})
    moment = moment_of(train, quant, trained.leaf.index)
    if rotation is None:
        new = train.weight.fake(trained.problem(given), learned, moment)
    else:
        at = [a % w.ndim for a in trained.axes]
        turned = train.weight.fake(trained.problem(rotate_axes(given.astype(jnp.float32), at, rotation)), learned, moment)
        new = rotate_axes(turned, at, rotation, back=True).astype(given.dtype)
    new = new if factor is None else unscaled(new, factor, w)
    return _from(train.schedule.weights, quant, new, w)


def _from(first: int, quant: Quant, new: jax.Array, old: jax.Array) -> jax.Array:
    """The rounded value from a step on, the float one before it."""
    return new if first == 0 else jnp.where(quant["step"] >= first, new, old)


def rounding(
    plan: Planned, quant: Quant, exact: Mapping[int, QTensor], tracks: bool = False, ran: MutableMapping[Key, str] | None = None
) -> Callable[[list[Any]], tuple[list[Any], dict[Key, Any]]] | None:
    """The program with rounded activations, caches and gradients; None if it has none of them.

    Args:
      plan: what is rounded where.
      quant: the state.
      exact: of `integer_weight`, by the parameter's index.
      tracks: whether ranges follow the data, where their estimator says so.
      ran: where the function notes of each site that meets a weight of `exact` why its product is of floats; "" if it is of integers.

    Returns:
      A function of flat arguments, which returns flat results and what sites and products took along, for `followed`.
    """
    program, by_site = plan.program, plan.site_of
    pairs = {choice.product.key: choice for choice in plan.products}
    caches = {choice.leaf.index: (choice.leaf, choice.spec) for choice in plan.caches if choice.spec is not None}
    if not by_site and not pairs and not caches:
        return None
    sites = {site.key: site for site in program.sites if site.key in by_site}

    def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        trained, state = by_site[site.key], _tracked(by_site[site.key], operands[1 - site.operand], state, quant) if tracks else state
        note = ran if ran is not None and site.leaf in exact else {}
        return _at_site(site, eqn, operands, trained, state or {}, quant, note), state

    def product_rule(product: Product, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        choice = pairs[product.key]
        state = _tracked_pair(choice, operands, state, quant) if tracks else state
        return _at_product(product, eqn, operands, choice, state or {}, quant), state

    products = {key: choice.product for key, choice in pairs.items()}
    interpreter = Interpreter(sites, rule, watched=frozenset(sites), products=products, product_rule=product_rule)
    state = _side_state(plan, quant)

    def run(values: list[Any]) -> tuple[list[Any], dict[Key, Any]]:
        values = [Packed(exact[i], trained=v) if i in exact else v for i, v in enumerate(values)]
        for index, (leaf, spec) in caches.items():
            values[index] = fake_cache(values[index], leaf, spec)
        outs, side = interpreter(program.jaxpr, values, state)
        return [v.tokens() if isinstance(v, FakeCache) else v for v in outs], side

    return run


def _side_state(plan: Planned, quant: Quant) -> dict[Key, Any]:
    """What each site and product takes along, with an axis for each scan over layers around it."""
    state: dict[Key, Any] = {}
    program, by_site = plan.program, plan.site_of
    lengths = scan_lengths(program) if by_site else {}
    for number, site in enumerate(program.sites, len(program.leaves)):
        trained = by_site.get(site.key)
        if trained is None:
            continue
        turns = [lengths[scan] for scan in site.scans]
        stored: Learned = quant.get("activations", {}).get(site.path, {})
        mine: dict[str, Any] = {name: of_site(a, trained.leaf, site, turns) for name, a in stored.items()}
        mine |= _key(trained.train, quant, number, turns)
        if mine:
            state[site.key] = mine
    for number, choice in enumerate(plan.products, len(program.leaves) + len(program.sites)):
        product = choice.product
        mine = {**quant.get("products", {}).get(product.name, {}), **_key(training_of(choice.rule), quant, number, product.turns)}
        if mine:
            state[product.key] = mine
    return state


def followed(plan: Planned, quant: Quant, side: Mapping[Key, Any]) -> Quant:
    """The state with the ranges that sites and products came back with.

    Args:
      plan: what is rounded where.
      quant: the state.
      side: of `rounding`.

    Returns:
      A state of the same structure.
    """
    lengths = scan_lengths(plan.program)
    activations, products = dict(quant.get("activations", {})), dict(quant.get("products", {}))
    for trained in plan.weights.values():
        if trained.leaf.path in activations and isinstance(trained.train.activation, TracksRanges):
            turns = [tuple(lengths[scan] for scan in site.scans) for site in trained.sites]
            activations[trained.leaf.path] = {
                name: of_leaf([side[site.key][name] for site in trained.sites], trained.leaf, trained.sites, turns, name in LEAST)
                for name in activations[trained.leaf.path]
            }
    for choice in plan.products:
        name = choice.product.name
        if name in products and isinstance(training_of(choice.rule).activation, TracksRanges):
            products[name] = {each: side[choice.product.key][each] for each in products[name]}
    return {**quant, **{kind: new for kind, new in (("activations", activations), ("products", products)) if kind in quant}}


def _tracked(trained: Trained, x: jax.Array, state: Any, quant: Quant) -> Any:
    """What a site takes along, with ranges that have seen `x`."""
    estimator = trained.train.activation
    if trained.act is None or not trained.act.static or not isinstance(estimator, TracksRanges):
        return state
    learned = {name: value for name, value in state.items() if name != "key"}
    return {**state, **estimator.track(x, learned, moment_of(trained.train, quant, 0))}


def _tracked_pair(choice: ProductChoice, operands: list[Any], state: Any, quant: Quant) -> Any:
    """What a product takes along, with ranges that have seen its operands."""
    train, pair = training_of(choice.rule), operands
    if not isinstance(train.activation, TracksRanges) or not any(act.static for act in choice.operands or ()):
        return state
    if choice.rotation is not None:
        pair = rotated_pair(choice.product, operands[0], operands[1], choice.rotation)
    now = moment_of(train, quant, 0)
    seen = {side: train.activation.track(x, state[side], now) for side, x in zip(_SIDES, pair, strict=True) if side in state}
    return {**state, **seen}


def _key(train: QAT, quant: Quant, number: int, turns: Sequence[int]) -> dict[str, jax.Array]:
    key = moment_of(train, quant, number).key
    return {} if key is None else {"key": keys_for(key, turns)}


def _at_site(
    site: Site, eqn: Any, operands: list[Any], trained: Trained, state: dict[str, Any], quant: Quant, ran: MutableMapping[Key, str]
) -> list[Any]:
    """One site: its activation is rounded, and the gradient of its result."""
    act, other, train = trained.act, 1 - site.operand, trained.train
    keys = jax.random.split(state["key"]) if "key" in state else (None, None)
    if act is not None:
        x = operands[other]
        rounded = _rounded(site, eqn, x, act, trained, state, moment_of(train, quant, 0, activation=True)._replace(key=keys[0]))
        rounded = _from(train.schedule.activations, quant, rounded, x)
        outs = _product(site, eqn, operands, rounded, ran)
    else:
        outs = compat.bind(eqn, [materialize(v) for v in operands])
    if train.gradient is None:
        return outs
    return [rounded_gradient(outs[0], keys[1], train.gradient, _gradient_axes(site, eqn, outs[0].ndim, train.gradient))]


def _product(site: Site, eqn: Any, operands: list[Any], rounded: jax.Array, ran: MutableMapping[Key, str]) -> list[Any]:
    """The product of a rounded activation, on integers where the weight is packed; its gradient is that of the float product."""
    other, weight = 1 - site.operand, operands[site.operand]
    values = [rounded if i == other else materialize(v) for i, v in enumerate(operands)]
    exact = product(site, eqn, jax.lax.stop_gradient(operands)) if isinstance(weight, Packed) else None
    if exact is not None:
        ran[site.key] = ""
        return [_float_gradient(eqn, tuple(values), exact)]
    packed = isinstance(weight, Packed)
    ran[site.key] = why_no_product(site, eqn, weight.q, rounded.ndim) if packed else "it is rearranged on the way as codes cannot be"
    return compat.bind(eqn, values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _float_gradient(eqn: Any, operands: tuple[Any, ...], exact: jax.Array) -> jax.Array:
    del eqn, operands
    return exact


@_float_gradient.defjvp
def _float_gradient_jvp(eqn: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    operands, exact = primals
    _, t = jax.jvp(lambda *values: compat.bind(eqn, list(values))[0], operands, tangents[0])
    return exact, t


def _rounded(
    site: Site, eqn: Any, x: jax.Array, act: ActSpec, trained: Trained, state: dict[str, Any], moment: Moment
) -> jax.Array:
    turn, axes = trained.rotation, _in_parameter_order(site)
    if act.static:
        learned = {name: value for name, value in state.items() if name != "key"}
        return trained.train.activation.fake_activation(x, act, learned, moment, _features(site, eqn, x))
    dtype = x.dtype
    if turn is not None:
        x = rotate_axes(x.astype(jnp.float32), axes, turn)
    rounded = _dynamic(x, act, shared_axes(site, eqn, act, x.ndim), column_axes(site, x.ndim), moment)
    return rounded if turn is None else rotate_axes(rounded, axes, turn, back=True).astype(dtype)


def _dynamic(x: jax.Array, act: ActSpec, axes: tuple[int, ...], rows: tuple[int, ...], moment: Moment) -> jax.Array:
    """Rounded with ranges of its own, to the bits of the step."""
    if moment.bits is None:
        return straight_through_activation(x, act, axes, rows)
    return straight_through_at(x, act, axes, moment)


def _features(site: Site, eqn: Any, x: jax.Array) -> int:
    """How many values one example has: the n of a gradient scale."""
    axes = conv_axes(eqn, x.ndim) if site.op == "conv_general_dilated" else [x for _, x in site.pairs]
    return math.prod(x.shape[i] for i in axes)


def _gradient_axes(site: Site, eqn: Any, ndim: int, act: ActSpec) -> tuple[int, ...]:
    """The axes of a result's gradient that share a scale: all, or per token those that the weight keeps."""
    if not act.per_token or site.op == "ragged_dot_general":
        return tuple(range(ndim)) if not act.per_token else (ndim - 1,)
    if site.op == "conv_general_dilated":
        batch = eqn.params["dimension_numbers"].out_spec[0]
        return tuple(i for i in range(ndim) if i != batch)
    contract, batch = eqn.params["dimension_numbers"]
    kept = eqn.invars[site.operand].aval.ndim - len(contract[site.operand]) - len(batch[site.operand])
    first = ndim - kept if site.operand == 1 else len(batch[0])
    return tuple(range(first, first + kept)) or tuple(range(ndim))


def _at_product(
    product: Product, eqn: Any, operands: list[Any], choice: ProductChoice, state: dict[str, Any], quant: Quant
) -> list[Any]:
    """One product of two activations: both operands are rounded."""
    train, given = training_of(choice.rule), operands
    dtypes = [x.dtype for x in operands]
    if choice.rotation is not None:
        operands = [*rotated_pair(product, operands[0], operands[1], choice.rotation)]
    keys = jax.random.split(state["key"], 3) if "key" in state else (None, None, None)
    moment, rounded = moment_of(train, quant, 0, activation=True), []
    for side, (x, act) in enumerate(zip(operands, choice.operands or (), strict=True)):
        if act.static:
            features = math.prod(x.shape[i] for i in product.contracted[side])
            now = moment._replace(key=keys[side])
            rounded.append(train.activation.fake_activation(x, act, state[_SIDES[side]], now, features))
        else:
            rounded.append(_dynamic(x, act, product_axes(act.per_token, product, side), (), moment))
    operands = [x.astype(dtype) for x, dtype in zip(rounded, dtypes, strict=True)]
    outs = compat.bind(eqn, operands)
    if train.schedule.activations:
        outs = [_from(train.schedule.activations, quant, new, old) for new, old in zip(outs, compat.bind(eqn, given), strict=True)]
    if train.gradient is None:
        return outs
    axes = tuple(range(outs[0].ndim)) if not train.gradient.per_token else (outs[0].ndim - 1,)
    return [rounded_gradient(outs[0], keys[2], train.gradient, axes)]


def _in_parameter_order(site: Site) -> list[int]:
    """A site's contracted activation dims in the order in which the parameter flattens its axes."""

    def place(pair: tuple[int, int]) -> tuple[int, int]:
        atoms = site.view.dims[pair[0]]
        return (atoms[0].axis, -atoms[0].stride) if atoms else (-1, 0)

    return [x for _, x in sorted(site.pairs, key=place)]
