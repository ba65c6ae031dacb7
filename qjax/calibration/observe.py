"""Runs a program with observers at its sites, wherever they stand: in loops over time, branches, shared weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibration.names import Names, name_sites
from qjax.calibration.observers import Observer
from qjax.calibration.products import OperandObservers, operand_rows
from qjax.calibration.ranges import minmax
from qjax.calibration.rows import columns, site_rows, stack_size, why_no_rows
from qjax.core import ActSpec, FloatSpec, IntSpec, int8, static
from qjax.policy import Policy, Rule, is_candidate, no_site_reason
from qjax.program import Interpreter, Key, Product, Program, ProgramCache, Site, compat, materialize, split_arguments


def init_states(program: Program, observers: Mapping[Key, Observer[Any]]) -> dict[Key, Any]:
    """Returns the state before any data of every observed site, with a leading axis for each scan that slices its weight."""
    lengths = scan_lengths(program)
    states = {}
    for site in program.sites:
        if site.key in observers:
            leaf = program.leaves[site.leaf]
            state = observers[site.key].init(stack_size(site, leaf), columns(site, leaf))
            lead = tuple(lengths[scan] for scan in site.scans)
            states[site.key] = jax.tree.map(lambda x, lead=lead: jnp.broadcast_to(x, (*lead, *x.shape)), state)
    return states


def watch_program(
    program: Program, observers: Mapping[Key, Observer[Any]], products: Mapping[Key, OperandObservers] | None = None
) -> Callable[[dict[Key, Any], list[Any]], tuple[list[Any], dict[Key, Any]]]:
    """Returns a pure function (states, flat arguments) -> (flat results, states) that runs a program and observes sites and products.

    Args:
      program: from `qjax.trace`.
      observers: an observer for each site key to watch.
      products: observers for each key of a product of two activations to watch.

    Returns:
      A function to be jitted by the caller; packed parameters are dequantized at their sites.
    """
    sites = {site.key: site for site in program.sites}

    def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        if state is not None:
            state = observers[site.key].update(state, site_rows(site, eqn, operands))
        return compat.bind(eqn, [materialize(v) for v in operands]), state

    pairs = products or {}

    def product_rule(product: Product, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        if state is not None:
            state = pairs[product.key].update(state, operand_rows(product, operands))
        return compat.bind(eqn, operands), state

    watched = {product.key: product for product in program.products if product.key in pairs}
    interpreter = Interpreter(sites, rule, frozenset(observers), inline_custom=True, products=watched, product_rule=product_rule)
    return lambda states, arguments: interpreter(program.jaxpr, arguments, states)


def observe_program(
    program: Program, observers: Mapping[Key, Observer[Any]], products: Mapping[Key, OperandObservers] | None = None
) -> Callable[[dict[Key, Any], list[Any]], dict[Key, Any]]:
    """Returns a pure function (states, flat arguments) -> states: `watch_program` for those who need no results."""
    run = watch_program(program, observers, products)
    return lambda states, arguments: run(states, arguments)[1]


def scan_lengths(program: Program) -> dict[Key, int]:
    """Returns how many turns each scan of a program takes, by its key."""
    found: dict[Key, int] = {}

    def walk(jaxpr: Any, prefix: Key) -> None:
        for index, eqn in enumerate(compat.parts(jaxpr)[0].eqns):
            if eqn.primitive.name == "scan":
                found[(*prefix, index)] = eqn.params["length"]
            for suffix, inner in compat.subprograms(eqn):
                walk(inner, (*prefix, index, *suffix))

    walk(program.jaxpr, ())
    return found


@dataclasses.dataclass(frozen=True)
class Watched:
    """A site that is to be observed.

    Attributes:
      site: the site.
      names: its own and its parts'.
      observer: what observes it.
      spec: what its activations are to become.
    """

    site: Site
    names: Names
    observer: Observer[Any]
    spec: IntSpec | FloatSpec


def check_where(where: Any) -> None:
    """Refuses what is neither a pattern nor a policy.

    Raises:
      TypeError: naming `where`.
    """
    if not isinstance(where, (str, Policy)) or where == "":
        raise TypeError(f"`where` must be a pattern over parameter paths such as '*mlp*', or a qjax.Policy, got {where!r}")


def watched_sites(
    program: Program, where: str | Policy, observer: Observer[Any] | None, spec: IntSpec | FloatSpec | None = None
) -> tuple[list[Watched], dict[str, str]]:
    """Finds the sites that a pattern or a policy names.

    Args:
      program: from `qjax.trace`.
      where: a pattern over parameter paths, or a policy: then the sites of the parameters that it quantizes.
      observer: for all of them; None for that of a policy's rule, else `minmax()`.
      spec: for all of them; None for that of a policy's rule, else `int8()`.

    Returns:
      The sites in data-flow order, and what cannot be observed: the reason by path and operation.

    Raises:
      ValueError: a pattern matches nothing, or nothing that can be observed.
    """
    policy = where if isinstance(where, Policy) else _policy_of(where, program)
    chosen = {c.leaf.index: c.activation for c in policy.resolve(program) if c.spec is not None}
    named = name_sites(program, scan_lengths(program))
    found, refused = [], {}
    for site in program.sites:
        if site.leaf not in chosen:
            continue
        reason = why_no_rows(site, program.leaves[site.leaf])
        if reason:
            refused[f"{site.path} ({site.op})"] = reason
            continue
        own_observer, own_spec = _of_rule(chosen[site.leaf])
        found.append(Watched(site, named[site.key], observer or own_observer, spec or own_spec))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it leaves everything float"
        raise ValueError(f"`where` {where!r} names no site that can be observed: {reasons}")
    return found, refused


def _policy_of(where: str, program: Program) -> Policy:
    """The policy of a pattern; refuses one that names nothing in the words of the argument, not of a rule that nobody wrote."""
    rule = Rule(where, weight=int8())
    matched = [leaf for leaf in program.leaves if rule.matches(leaf.path)]
    if not any(map(is_candidate, matched)):
        known = ", ".join([leaf.path for leaf in program.leaves if is_candidate(leaf)][:3]) or "nothing"
        why = f"only {matched[0].path!r}: {no_site_reason(matched[0])}" if matched else "no parameter of the program"
        raise ValueError(f"`where` {where!r} matches {why}; what can be observed is {known}")
    return Policy([rule])


def _of_rule(act: ActSpec | None) -> tuple[Observer[Any], IntSpec | FloatSpec]:
    observer: Any = minmax() if act is None or act.observer is None else act.observer
    spec: Any = int8() if act is None or (act.is_float and not act.static) else act.spec
    return observer, static(spec).spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """What was seen at one site: a pytree.

    Attributes:
      state: the observer's; the first axis of its arrays runs over the site's parts (the layers of a stack, the experts, the groups of a
        convolution; see `Observe.parts`), one if there are none.
      observer: what made it; static.
    """

    state: Any
    observer: Any = dataclasses.field(metadata={"static": True})

    def merge(self, other: Observation) -> Observation:
        """Returns what was seen in the data of both."""
        if self.observer != other.observer:
            raise ValueError(f"`other` was made by {other.observer}, not by {self.observer}: observe both with the same observer")
        return Observation(self.observer.merge(self.state, other.state), self.observer)

    def range(self, spec: IntSpec | FloatSpec) -> tuple[jax.Array, jax.Array]:
        """Returns the range to cover, (lo, hi), float32 (parts,) each, for what the activations are to become."""
        if not hasattr(self.observer, "range"):
            raise TypeError(f"`observer` {self.observer} finds no range: observe with qjax.minmax(), qjax.entropy() or another that does")
        return self.observer.range(self.state, spec)


Seen = dict[str, Observation]


@dataclasses.dataclass(frozen=True, eq=False)
class Observe:
    """A function that also returns what its sites read. Built by `observe`.

    Attributes:
      fn: the function.
      where: a pattern over parameter paths, or a policy.
      observer: what observes a site; None for that of a policy's rule, else `minmax()`.
    """

    fn: Callable[..., Any]
    where: str | Policy
    observer: Observer[Any] | None

    @functools.cached_property
    def programs(self) -> ProgramCache:
        return ProgramCache(self.fn)

    def __call__(self, params: Any, *args: Any, seen: Seen | None = None, **kwargs: Any) -> tuple[Any, Seen]:
        arguments = split_arguments(params, args, kwargs)
        program = self.programs(arguments)
        sites = watched_sites(program, self.where, self.observer)[0]
        observers = {w.site.key: w.observer for w in sites}
        start = init_states(program, observers)
        if seen is not None:
            _check_seen(seen, sites, start)
            start = {w.site.key: unflattened(seen[w.names.site].state, start[w.site.key]) for w in sites}
        outs, states = watch_program(program, observers)(start, [*arguments.params, *arguments.inputs])
        return jax.tree.unflatten(program.out_tree, outs), observations(states, sites)

    def init(self, params: Any, *args: Any, **kwargs: Any) -> Seen:
        """Returns what was seen before any data, to begin a loop over batches with; arguments as of the function, shapes are enough."""
        program = self.programs(split_arguments(params, args, kwargs))
        sites = watched_sites(program, self.where, self.observer)[0]
        return observations(init_states(program, {w.site.key: w.observer for w in sites}), sites)

    def parts(self, params: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[str, ...]]:
        """Returns the names of the parts of every site, in the order of the first axis of its state."""
        program = self.programs(split_arguments(params, args, kwargs))
        return {w.names.site: w.names.parts for w in watched_sites(program, self.where, self.observer)[0]}

    def merge(self, a: Seen, b: Seen) -> Seen:
        """Returns what was seen in the data of both."""
        if a.keys() != b.keys():
            raise ValueError(f"`b` has other sites than `a`: {', '.join(sorted(a.keys() ^ b.keys()))} in one of them only")
        return {name: a[name].merge(b[name]) for name in a}

    def ranges(self, seen: Seen, spec: IntSpec | FloatSpec) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Returns (lo, hi) for every site, float32 (parts,) each, for what the activations are to become."""
        return {name: observation.range(spec) for name, observation in seen.items()}


def observe(fn: Callable[..., Any], where: str | Policy = "*", *, observer: Observer[Any] | None = None) -> Observe:
    """Transforms `fn(params, *args)` so that it also returns what the sites of its parameters read.

    `seen` maps the name of a site (its parameter's path; `w:dot_general.1` where a parameter has several) to an `Observation`, in
    memory that does not depend on how many data are seen. Activations are as the function has them: packed parameters are
    dequantized, and nothing else is rounded.

    Args:
      fn: any JAX function whose first argument is the tree of parameters.
      where: which parameters' sites: a pattern over paths (`*` crosses `/`), or a policy: those of the parameters that it quantizes.
      observer: what is remembered, such as `qjax.entropy()`; None for that of a policy's rule, else `qjax.minmax()`.

    Returns:
      A function with the same arguments that returns `(fn's result, seen)`. With `seen=` it goes on from there. It composes with `jit`,
      `vmap`, `scan` and sharding; do not differentiate it, for it opens custom derivative rules. Its `init` gives what is seen before any
      data, `merge` what is seen in two, `ranges` the range of each site for a spec, `parts` the names of the parts of stacked sites.
      Lookups, and sites inside `shard_map` or the condition of a loop, are not observed.

    Raises:
      TypeError: `where` is neither a pattern nor a policy, `fn` no function, or `observer` no observer.
      ValueError: when called: `where` names nothing that can be observed.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> watch = observe(lambda p, x: jnp.tanh(x @ p["w"]), observer=qjax.minmax())
      >>> params = {"w": jnp.ones((2, 3))}
      >>> out, seen = jax.jit(watch)(params, jnp.array([[-1.0, 4.0]]))
      >>> out.shape, seen["w"].state.hi.tolist()
      ((1, 3), [4.0])
      >>> _, seen = jax.jit(watch)(params, jnp.array([[5.0, 0.0]]), seen=seen)
      >>> [end.tolist() for end in watch.ranges(seen, qjax.uint8())["w"]]
      [[-1.0], [5.0]]
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be a function of (params, *args), got {type(fn).__name__}: for a module see qjax.nnx.function")
    check_where(where)
    if observer is not None and (isinstance(observer, type) or not all(hasattr(observer, name) for name in ("init", "update", "merge"))):
        raise TypeError(f"`observer` must be an observer such as qjax.minmax() or qjax.entropy(), got {observer!r}")
    return Observe(fn, where, observer)


def observations(states: Mapping[Key, Any], sites: list[Watched]) -> Seen:
    """Names the states of a program's sites, with one axis over the parts in place of one for each scan."""

    def flat(w: Watched) -> Any:
        scans = len(w.site.scans)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[scans + 1 :]), states[w.site.key])

    return {w.names.site: Observation(flat(w), w.observer) for w in sites}


def unflattened(state: Any, like: Any) -> Any:
    """Gives a state the leading axes of another."""
    return jax.tree.map(lambda x, y: x.reshape(y.shape), state, like)


def _check_seen(seen: Seen, sites: list[Watched], start: Mapping[Key, Any]) -> None:
    names = {w.names.site for w in sites}
    if seen.keys() != names:
        raise ValueError(f"`seen` is of other sites than this call's: {', '.join(sorted(seen.keys() ^ names))} in one of them only")
    for w in sites:
        own = seen[w.names.site]
        if own.observer != w.observer:
            raise ValueError(f"`seen` of {w.names.site!r} was made by {own.observer}, and this observes with {w.observer}")
        sizes = [[x.size for x in jax.tree.leaves(state)] for state in (own.state, start[w.site.key])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"`seen` of {w.names.site!r} has another number of parts or columns than this call's site")
