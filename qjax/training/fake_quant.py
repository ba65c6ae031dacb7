"""`fake_quant`: trains through the rounding that the packed model will have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core import ActSpec, OnlineRotation, Spec
from qjax.policy import Choice, Policy, ProductChoice, RotatesInputs, check_policy
from qjax.program import Interpreter, Product, Program, ProgramCache, Site, compat, split_arguments
from qjax.ptq.method import methods_of
from qjax.runtime.products import rotated_pair
from qjax.runtime.products import shared_axes as product_axes
from qjax.runtime.rotation import rotate_axes
from qjax.runtime.select import column_axes, shared_axes
from qjax.training.straight_through import straight_through, straight_through_activation


@dataclasses.dataclass(frozen=True, eq=False)
class FakeQuant:
    """A function of float parameters that computes with fake-quantized ones. Built by `fake_quant`.

    Attributes:
      fn: the float function.
      policy: which parameters are fake-quantized.
    """

    fn: Callable[..., Any]
    policy: Policy

    @functools.cached_property
    def programs(self) -> ProgramCache:
        return ProgramCache(self.fn)

    def __call__(self, params: Any, *args: Any, quant: Any = None, **kwargs: Any) -> Any:
        if quant:
            raise ValueError(f"`quant` must be what `init` gave, which holds nothing for this policy; got {quant!r}")
        arguments = split_arguments(params, args, kwargs)
        program = self.programs(arguments)
        weights = self.leaves(params, *args, **kwargs)(params)
        acts = {c.leaf.index: c.activation for c in self.policy.resolve(program) if c.activation is not None}
        products = self.policy.resolve_products(program)
        if not acts and not any(choice.operands for choice in products):
            return self.fn(weights, *args, **kwargs)
        turns = {c.leaf.index: r for c in self.policy.resolve(program) if (r := rotation_of(c)) is not None}
        run = _rounding(program, acts, products, turns)
        flat = split_arguments(weights, args, kwargs)
        return jax.tree.unflatten(program.out_tree, run([*flat.params, *flat.inputs]))

    def init(self, key: jax.Array, params: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the state of the quantizers, to be passed as `quant=` and trained beside the parameters.

        Rounding to nearest with ranges from the extreme values has none: the state is an empty tree. Checks the policy
        against the program.

        Args:
          key: a random key.
          params: the float parameters.
          *args: arguments of the function.
          **kwargs: keyword arguments of the function.

        Returns:
          A tree of arrays.
        """
        del key
        self.leaves(params, *args, **kwargs)
        return {}

    def leaves(self, params: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Finds the sites, and returns the function that fake-quantizes a tree of parameters."""
        program = self.programs(split_arguments(params, args, kwargs))
        self.policy.resolve_products(program)
        plan: dict[int, tuple[Spec, tuple[int, ...], tuple[int, ...], str]] = {}
        turns: dict[int, OnlineRotation] = {}
        for choice in self.policy.resolve(program):
            if choice.spec is not None:
                site, ndim = choice.leaf.sites[0], len(choice.leaf.shape)
                axes = tuple(a - ndim for a in site.contracted)
                plan[choice.leaf.index] = (choice.spec, axes, tuple(a - ndim for a in site.stacked), choice.leaf.path)
                if (rotation := rotation_of(choice)) is not None:
                    turns[choice.leaf.index] = rotation

        def quantize_leaves(params: Any) -> Any:
            arguments = split_arguments(params, (), {})
            new = [_rounded(w, *plan[i], turns.get(i)) if i in plan else w for i, w in enumerate(arguments.params)]
            return arguments.rebuild(new, [])[0]

        return quantize_leaves


def rotation_of(choice: Choice) -> OnlineRotation | None:
    """By what the packed weight's products will rotate their input."""
    method = None if choice.rule is None or choice.spec is None else choice.rule.method
    return next((each.rotation for each in methods_of(method) if isinstance(each, RotatesInputs)), None)


def _rounded(w: Any, spec: Spec, axes: tuple[int, ...], stacked: tuple[int, ...], path: str, rotation: OnlineRotation | None) -> Any:
    """A fake-quantized weight; with an on-line rotation it is rounded where it is rotated."""
    if rotation is None:
        return straight_through(w, spec, axes, stacked, path)
    w = jnp.asarray(w)
    at = [a % w.ndim for a in axes]
    turned = straight_through(rotate_axes(w.astype(jnp.float32), at, rotation), spec, axes, stacked, path)
    return rotate_axes(turned, at, rotation, back=True).astype(w.dtype)


def _rounding(
    program: Program, acts: Mapping[int, ActSpec], named: Sequence[ProductChoice], turns: Mapping[int, OnlineRotation]
) -> Callable[[list[Any]], list[Any]]:
    """The program with rounded activations at the sites of some parameters and in some products of two activations."""
    sites = {site.key: site for site in program.sites if site.leaf in acts and site.op != "gather"}
    for site in sites.values():
        if acts[site.leaf].static:
            raise ValueError(
                f"`activation` {acts[site.leaf]} of {site.path!r} needs ranges, and training has none yet: train with qjax.dynamic(...)"
            )
        if site.sharded:
            raise ValueError(f"`activation` of {site.path!r} stands inside a shard_map: apply fake_quant inside of it")

    def rule(site: Site, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        act, other = acts[site.leaf], 1 - site.operand
        x = operands[other]
        turn, axes = turns.get(site.leaf), _in_parameter_order(site)
        if turn is not None:
            x = rotate_axes(x.astype(jnp.float32), axes, turn)
        rounded = straight_through_activation(x, act, shared_axes(site, eqn, act, x.ndim), column_axes(site, x.ndim))
        if turn is not None:
            rounded = rotate_axes(rounded, axes, turn, back=True).astype(operands[other].dtype)
        return compat.bind(eqn, [rounded if i == other else v for i, v in enumerate(operands)]), state

    pairs = {choice.product.key: choice.operands for choice in named if choice.operands is not None}
    turned = {choice.product.key: choice.rotation for choice in named if choice.rotation is not None}
    for choice in named:
        if any(act.static for act in choice.operands or ()):
            raise ValueError(
                f"`activation` of {choice.product.name!r} needs ranges, and training has none yet: train with qjax.dynamic(...)"
            )

    def product_rule(product: Product, eqn: Any, operands: list[Any], state: Any) -> tuple[list[Any], Any]:
        dtypes = [x.dtype for x in operands]
        if product.key in turned:
            operands = [*rotated_pair(product, operands[0], operands[1], turned[product.key])]
        both = enumerate(zip(operands, pairs[product.key], strict=True))
        rounded = [straight_through_activation(x, act, product_axes(act.per_token, product, side)) for side, (x, act) in both]
        return compat.bind(eqn, [x.astype(dtype) for x, dtype in zip(rounded, dtypes, strict=True)]), state

    products = {choice.product.key: choice.product for choice in named if choice.operands is not None}
    interpreter = Interpreter(sites, rule, watched=frozenset(sites), products=products, product_rule=product_rule)
    return lambda values: interpreter(program.jaxpr, values)[0]


def _in_parameter_order(site: Site) -> list[int]:
    """A site's contracted activation dims in the order in which the parameter flattens its axes."""

    def place(pair: tuple[int, int]) -> tuple[int, int]:
        atoms = site.view.dims[pair[0]]
        return (atoms[0].axis, -atoms[0].stride) if atoms else (-1, 0)

    return [x for _, x in sorted(site.pairs, key=place)]


def fake_quant(fn: Callable[..., Any], policy: Policy) -> FakeQuant:
    """Transforms `fn(params, *args)` so that it computes with rounded weights and trains the float ones.

    Forward, a weight is `dequantize(quantize(w))`, bit for bit what the packed model will hold (a rule's `method` chooses codes
    after training; here every rule rounds to nearest, where it is rotated with `qjax.online_rotation`). The activations of a rule
    that names them, and both operands of a product of two activations that a rule names, are rounded as the packed model's integers
    are. Backward, the straight-through estimator:
    the gradient passes where
    q_min <= w / scale <= q_max and is zero outside; see `straight_through`.

    Args:
      fn: any JAX function whose first argument is the tree of float parameters.
      policy: which parameters are fake-quantized, and to what.

    Returns:
      A function with the same arguments and results that composes with `jit`, `grad`, `vmap`, `scan` and `shard_map`; its
      `init(key, params, *args)` gives the state of policies that have one.

    Raises:
      TypeError: `policy` is no policy.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fq = fake_quant(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", weight=qjax.int4())]))
      >>> params = {"w": jnp.array([[0.2], [-1.5]])}
      >>> fq(params, jnp.eye(2)).tolist()
      [[0.20000000298023224], [-1.600000023841858]]
      >>> jax.grad(lambda p: fq(p, jnp.ones((1, 2))).sum())(params)["w"].tolist()
      [[1.0], [1.0]]

    Source: Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877.
    """
    check_policy(policy)
    return FakeQuant(fn, policy)
