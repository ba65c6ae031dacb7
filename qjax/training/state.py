"""The state of quantizers: learned numbers, ranges, the step and a seed, as one tree of float32 arrays.

    {"weights": {path: {name: array}}, "activations": {path: {name: array}}, "products": {name: {"left": .., "right": ..}},
     "step": float32, "seed": float32 (2,), "held": {kind: {path: {name: array, "from": float32}}}, "policy": {fingerprint: float32},
     "uncalibrated": float32}

Entries without anything in them are left out. All is float32, so that `jax.grad` takes the whole tree: what does not train has the
gradient 0. The seed is two whole numbers below 2^24, which float32 holds, as it holds steps. "held" has the copies of what a schedule
freezes, see `freezing`.

The name of the one entry of "policy" is the `fingerprint` of what is rounded and how it trains; its number is 0. So the structure of a
state says whose it is: it is known while tracing, and goes where the numbers go. A state without numbers has none: {}.

So does "uncalibrated", which only a state has whose ranges no data has set yet: nothing computes with it, under `jit` neither, where NaN
cannot be seen. Ranges that follow the data begin with those of the first batch, and need none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.calibration import AllFinite, OperandObservers, Together, init_states, observe_program
from qjax.calibration.observe import scan_lengths
from qjax.core import ActSpec
from qjax.policy import ProductChoice
from qjax.program import Key, Program, Site
from qjax.training.arguments import as_dicts, check_form, in_form_of
from qjax.training.estimator import LEARNED, ActivationEstimator, Learned, Moment, TracksRanges
from qjax.training.fingerprint import fingerprint
from qjax.training.freezing import held, recorded, standing
from qjax.training.planned import Planned, Trained
from qjax.training.qat import QAT, training_of
from qjax.training.side_state import of_leaf, range_shape
from qjax.training.trainable import check_trainable

Quant = dict[str, Any]
Known = Literal["all", "still", "none"]
LEAST = ("lo", "offset")  # of these the smallest covers all
UNCALIBRATED = "uncalibrated"
_SIDES = ("left", "right")
_RANGES = ("activations", "products")
NEEDS = "this policy has static or learned ranges, a schedule or random rounding"
MISSING = f"`quant` is missing: {NEEDS}; pass quant=fq.init(key, params, *args)"
UNKNOWN = "give `init` arrays and not shapes, or call quant = fq.calibrate(quant, params, batches)"


def begin(plan: Planned, key: jax.Array, params: Sequence[Any], known: Mapping[str, Learned] | None = None) -> Quant:
    """The state before data: learned numbers of weights, ranges that are not known (NaN), step 0 and a seed.

    What is `known` of a weight, by its path, is not looked for.
    """
    found = known or {}
    weights = {t.leaf.path: found[t.leaf.path] if t.leaf.path in found else t.train.weight.init(t.problem(params[i]))
               for i, t in plan.weights.items()}  # fmt: skip
    state: Quant = {"weights": {path: learned for path, learned in weights.items() if learned}}
    unknown = _unknown(plan)
    state |= jax.tree.map(lambda a: jnp.full(a.shape, jnp.nan, jnp.float32), unknown)
    if plan.steps:
        state["step"] = jnp.float32(0)
        state["seed"] = jax.random.randint(key, (2,), 0, 2**24).astype(jnp.float32)
        state["held"] = held(plan, state)
    state = {name: value for name, value in state.items() if not isinstance(value, dict) or value}
    return state | ({"policy": {fingerprint(plan): jnp.float32(0)}} if state else {})


def uncalibrated(plan: Planned, state: Quant) -> Quant:
    """A state of `begin` with the mark that it has ranges to be set by data, if it has.

    What is traced gets none: of it only the structure may be wanted, `jax.eval_shape` of a state to restore one that has its ranges.
    """
    wait = [state[kind][name] for kind, name in _waiting(plan, state)]
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(wait))
    return state | {UNCALIBRATED: jnp.float32(0)} if wait and not traced else state


def _waiting(plan: Planned, state: Quant) -> list[tuple[str, str]]:
    """The kinds and names of the ranges that data must set before training; those that follow the data begin in it."""
    trains = {t.leaf.path: t.train for t in plan.weights.values()} | {c.product.name: training_of(c.rule) for c in plan.products}
    named = [(kind, name) for kind in _RANGES for name in state.get(kind, {})]
    return [(kind, name) for kind, name in named if not isinstance(trains[name].activation, TracksRanges)]


def shapes(plan: Planned) -> Quant:
    """The state as shapes. What is alike, as the weights of a model's layers are, is looked at once: every trace asks for this."""
    alike: dict[Any, Any] = {}
    learned: dict[str, Any] = {}
    for trained in plan.weights.values():
        leaf, estimator = trained.leaf, trained.train.weight
        problem = trained.problem(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))._replace(name="")  # which names it in errors only
        if (problem, estimator) not in alike:
            begun = jax.eval_shape(lambda w, to=estimator, problem=problem: to.init(problem._replace(w=w)), problem.w)
            alike[problem, estimator] = begun
        learned[leaf.path] = alike[problem, estimator]
    return jax.eval_shape(lambda learned: begin(plan, jax.random.key(0), (), learned), learned)


def _unknown(plan: Planned) -> Quant:
    """The ranges of static activations and products, as shapes."""
    named = functools.cache(_names)
    activations = {
        t.leaf.path: _like(named(t.train.activation, t.act), range_shape(t.leaf))
        for t in plan.weights.values() if t.act is not None and t.act.static and t.sites
    }  # fmt: skip
    products = {}
    for choice in plan.products:
        sides = zip(_SIDES, choice.operands or (), strict=True)
        estimator = training_of(choice.rule).activation
        found = {side: _like(named(estimator, act), choice.product.turns) for side, act in sides if act.static}
        if found:
            products[choice.product.name] = found
    return {"activations": activations, "products": products}


def _names(estimator: ActivationEstimator, act: ActSpec) -> tuple[str, ...]:
    """What an estimator knows of a range."""
    return tuple(jax.eval_shape(lambda: estimator.from_data(estimator.observer(act).init(1, 1), act)))


def _like(names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}


def check(quant: Any, plan: Planned, known: Known = "all", missing: str = MISSING, unknown: str = UNKNOWN) -> Quant:
    """Refuses a state of another policy or program, and ranges that no data has set where they must be `known`.

    Args:
      quant: the state, or None.
      plan: what is rounded.
      known: which ranges must be: "all", "still" all but those that follow the data, or "none".
      missing: what is said where there is none and one is needed.
      unknown: what is to be done where there are no ranges.

    Returns:
      The state as plain dictionaries, without a mark of missing ranges; {} of None.

    Raises:
      TypeError, ValueError: naming `quant`, what differs, and the remedy.
    """
    if quant is not None:
        check_form(quant)
    want, given = shapes(plan), as_dicts(quant or {})
    if want and quant is None:
        raise ValueError(missing)
    marked = given.pop(UNCALIBRATED, None) is not None
    flat, wanted = _by_name(given), _by_name(want)
    other = sorted(name for name in flat.keys() | wanted.keys() if _shape(flat.get(name)) != _shape(wanted.get(name)))
    if other or jax.tree.structure(given) != jax.tree.structure(want):
        raise ValueError(_difference(given, want, other))
    for name, leaf in flat.items():
        if leaf.dtype != jnp.float32:
            raise TypeError(f"`quant`{name} must be float32, got {leaf.dtype}: keep the state in the dtype that `init` gives")
    if known != "none" and marked:
        raise ValueError(_without_range(*_waiting(plan, given)[0], unknown))
    if known == "all":
        _check_ranges(given, unknown)
    return given


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shape(leaf: Any) -> Any:
    return None if leaf is None else getattr(leaf, "shape", type(leaf))


def _difference(given: Quant, want: Quant, other: Sequence[str]) -> str:
    """Says how a state differs from the one that is wanted, in the entries `other`, and what to do."""
    entries = [name for name in other if not name.startswith("['policy']")]
    named = f"it differs in {', '.join((entries or other)[:3])}" if other else "it has another structure"
    theirs = given.get("policy")
    if isinstance(theirs, Mapping) and theirs.keys() != want.get("policy", {}).keys():
        how = named if entries else "what it rounds, to what, or how that trains is not what `init` was given"
        return (f"`quant` is of another policy: {how}. A policy cannot change between steps: call init again; to go on with what was "
                "learned, quant = fq.carried(quant, fq.init(...)), or begin with fq.from_packed")  # fmt: skip
    if isinstance(theirs, Mapping) and entries:
        return (f"`quant` is of this policy and of another program: {named}. Call the function with arguments under which it reads the "
                "same parameters as in `init`, or make a state for these: fq.carried(quant, fq.init(...))")  # fmt: skip
    return (f"`quant` must be what `init` gave for this policy and these parameters, {named}: a policy "
            "cannot change between steps; call init again")  # fmt: skip


def _check_ranges(quant: Quant, unknown: str) -> None:
    """Refuses ranges that no data has set. Looks at concrete arrays only."""
    for kind in _RANGES:
        for path, leaf in jax.tree_util.tree_leaves_with_path(quant.get(kind, {})):
            if not isinstance(leaf, Tracer) and bool(np.isnan(np.asarray(leaf)).any()):
                raise ValueError(_without_range(kind, path[0].key, unknown))  # pyright: ignore[reportAttributeAccessIssue]


def _without_range(kind: str, name: str, unknown: str) -> str:
    return f"`quant` has no range of the {kind} {name!r} yet: {unknown}"


def labels(quant: Quant) -> Any:
    """"learned" or "fixed" for every array of a state, a tree for `optax.multi_transform`.

    Raises:
      TypeError: it holds what is packed or not floating, and is no state.
    """
    check_form(quant)
    check_trainable(quant, "quant")

    def label(path: Any, _: Any) -> str:
        return "learned" if path[-1].key in LEARNED and path[0].key != "held" else "fixed"

    return jax.tree_util.tree_map_with_path(label, quant)


def advance(quant: Quant) -> Quant:
    """The state of the next step: what is frozen is put back, and what is not is copied.

    Raises:
      TypeError: `quant` is no state.
    """
    check_form(quant)
    state = as_dicts(quant)
    return in_form_of(quant, {**recorded(standing(state)), "step": state["step"] + 1} if "step" in state else state)


def carried(quant: Quant, begun: Quant) -> Quant:
    """`begun` with the numbers of `quant` where both have them in the same shape; see `FakeQuant.carried`."""
    check_form(quant)
    check_form(begun)
    quant, begun = as_dicts(quant), as_dicts(begun)
    left = ("policy", "held", *((UNCALIBRATED, *_RANGES) if UNCALIBRATED in quant else ()))
    theirs = _by_name({name: value for name, value in standing(quant).items() if name not in left})
    own = _by_name(begun)
    same = {name: theirs[name] for name, value in own.items() if name in theirs and _shape(theirs[name]) == _shape(value)}
    if begun and not same:
        raise ValueError("`quant` and `begun` have no number of the same name and shape in common: they are states of other parameters; "
                         "begin with what init gives")  # fmt: skip
    new = recorded(jax.tree.unflatten(jax.tree.structure(begun), [*(own | same).values()]))
    ranges = _by_name({kind: new[kind] for kind in _RANGES if kind in new})
    known = ranges.keys() <= same.keys()
    return {name: value for name, value in new.items() if name != UNCALIBRATED or not known}


def moment_of(train: QAT, quant: Quant, number: int, activation: bool = False) -> Moment:
    """What an estimator of weights, or of activations, is told in this step; `number` tells sites apart."""
    step = quant.get("step")
    if step is None or not train.steps:
        return Moment()
    frozen = None if train.schedule.freeze is None else step >= train.schedule.freeze
    bits = train.schedule.bits_at(step, activation)
    return Moment(_key(quant, number) if train.random else None, bits, frozen)


def _key(quant: Quant, number: int) -> jax.Array:
    first, second = quant["seed"].astype(jnp.uint32)
    key = jax.random.fold_in(jax.random.key(first), second)
    return jax.random.fold_in(jax.random.fold_in(key, quant["step"].astype(jnp.uint32)), number)


def ranges(plan: Planned, batches: Sequence[tuple[Program, Sequence[Any]]], weights: Sequence[Any]) -> Quant:
    """Finds the ranges of static activations and products from data.

    Args:
      plan: of the first batch's program; those of the others have the same sites.
      batches: (program, its inputs).
      weights: flat parameters, rounded.

    Returns:
      The entries "activations" and "products" of a state.
    """
    static = {site.key: t for t in plan.weights.values() if t.act is not None and t.act.static for site in t.sites}
    pairs = {c.product.key: c for c in plan.products if any(act.static for act in c.operands or ())}
    if not static and not pairs:
        return {}
    observers: Any = {key: Together((t.train.activation.observer(_act(t)), AllFinite())) for key, t in static.items()}
    watched = {key: _operands(choice) for key, choice in pairs.items()}
    states: Any = None
    runs = {}
    for program, inputs in batches:
        if id(program) not in runs:
            runs[id(program)] = jax.jit(observe_program(program, observers, watched))
        start = init_states(program, observers) | {k: o.init(pairs[k].product) for k, o in watched.items()}
        states = runs[id(program)](start if states is None else states, [*weights, *inputs])
    _check_finite(plan, states)
    lengths = scan_lengths(plan.program)
    activations = {
        t.leaf.path: _of_parameter(t, states, lengths) for t in plan.weights.values() if t.act is not None and t.act.static and t.sites
    }
    products = {choice.product.name: _of_product(choice, states[key]) for key, choice in pairs.items()}
    return {name: found for name, found in (("activations", activations), ("products", products)) if found}


def _act(trained: Trained) -> ActSpec:
    if trained.act is None:
        raise TypeError(f"{trained.leaf.path} has no activation spec")
    return trained.act


def _operands(choice: ProductChoice) -> OperandObservers:
    estimator = training_of(choice.rule).activation
    both = [Together((estimator.observer(act), AllFinite())) if act.static else None for act in choice.operands or ()]
    return OperandObservers(*both, rotation=choice.rotation)


def _check_finite(plan: Planned, states: Any) -> None:
    for site in plan.program.sites:
        if site.key in states:
            _refuse(states[site.key][1], f"the input of {site.path!r}")
    for choice in plan.products:
        for side, state in zip(_SIDES, states.get(choice.product.key, ()), strict=False):
            if state is not None:
                _refuse(state[1], f"the {side} operand of {choice.product.name!r}")


def _refuse(state: Any, what: str) -> None:
    for leaf in jax.tree.leaves(state):
        if not isinstance(leaf, Tracer) and bool(np.isnan(np.asarray(leaf)).any()):
            raise ValueError(f"the data gives {what} NaN or infinity; look at the batches and the parameters")


def _of_parameter(trained: Trained, states: Mapping[Key, Any], lengths: Mapping[Key, int]) -> Learned:
    act, estimator = _act(trained), trained.train.activation
    turns = [tuple(lengths[scan] for scan in site.scans) for site in trained.sites]
    seen = [states[site.key][0] for site in trained.sites]
    found = [_by_turn(lambda s: estimator.from_data(s, act), state, len(n)) for state, n in zip(seen, turns, strict=True)]
    parts = {name: [each[name] for each in found] for name in found[0]}
    return _known({name: of_leaf(each, trained.leaf, trained.sites, turns, name in LEAST) for name, each in parts.items()})


def _of_product(choice: ProductChoice, states: Any) -> dict[str, Learned]:
    estimator, found = training_of(choice.rule).activation, {}
    for side, act, state in zip(_SIDES, choice.operands or (), states, strict=True):
        if state is not None:
            found[side] = _known(_by_turn(lambda s, act=act: estimator.from_data(s, act), state[0], len(choice.product.turns)))
    return found


def _by_turn(f: Callable[[Any], Learned], state: Any, depth: int) -> Learned:
    for _ in range(depth):
        f = jax.vmap(f)
    return f(state)


def _known(found: Learned) -> Learned:
    """What no data reached gets the widest range of the others, or 1: all of its numbers are 0. A range may well end at 0."""
    reached = functools.reduce(jnp.logical_or, (value != 0 for value in found.values()))

    def known(value: jax.Array) -> jax.Array:
        widest = jnp.max(value)
        return jnp.where(reached, value, jnp.where(widest > 0, widest, 1.0))

    return {name: (value if name in LEAST else known(value)).astype(jnp.float32) for name, value in found.items()}


def site_number(program: Program, site: Site) -> int:
    """A number of its own for each site, behind those of parameters."""
    return len(program.leaves) + next(i for i, each in enumerate(program.sites) if each.key == site.key)
