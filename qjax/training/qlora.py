"""`qlora`: a function whose frozen parameters stay packed, and whose adapters train."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

from qjax.calibration.batches import as_batches
from qjax.calibration.observe import scan_lengths
from qjax.core import QProduct, QTensor, check_key
from qjax.core.rounding import range_params
from qjax.core.specs import check_choice
from qjax.policy import Choice, Policy, check_policy
from qjax.program import Arguments, Interpreter, Program, ProgramCache, check_function, split_arguments
from qjax.ptq import Result, quantize
from qjax.ptq.low_rank import AdapterDtype
from qjax.ptq.quantize import shapes_of
from qjax.runtime.installed import runtime_of
from qjax.runtime.products import product_rule
from qjax.runtime.quantized import checked_products, named_products
from qjax.training.adapted import Adapted, Adapters, adapted, check_adapters, check_base, check_finished, check_form
from qjax.training.adapted_site import adapted_rule, with_parts
from qjax.training.arguments import called_with
from qjax.training.side_state import keys_for, whole_ranges


@dataclasses.dataclass(frozen=True, eq=False)
class QLoRA:
    """A function of adapters and of the parameters they stand beside. Built by `qlora`.

    Attributes:
      fn: the float function.
      policy: which parameters have adapters, and what the base is packed to.
      sites: products of two activations that multiply integers, by name, as for `qjax.quantized`.
    """

    fn: Callable[..., Any]
    policy: Policy
    sites: Mapping[str, QProduct] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def programs(self) -> ProgramCache:
        return ProgramCache(self.fn)

    def plan(self, base: Any, *args: Any, **kwargs: Any) -> dict[int, Adapted]:
        """Which parameters have adapters in the program of these arguments (shapes are enough), by index."""
        _check_tree(base)
        return adapted(self.programs(split_arguments(base, args, kwargs)), self.policy)

    def __call__(self, adapters: Adapters, base: Any, *args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> Any:
        check_form(adapters)
        if dropout_key is not None:
            check_key("dropout_key", dropout_key)
        arguments, program, plan = self._resolved(base, args, kwargs)
        check_adapters(adapters, plan)
        values = [with_parts(w, plan[i], adapters[plan[i].leaf.path]) if i in plan else w for i, w in enumerate(arguments.params)]
        named = named_products(program, self.sites)
        rule = functools.partial(adapted_rule, plan=plan, runtime=runtime_of())
        interpreter = Interpreter({site.key: site for site in program.sites}, rule=rule, products=named, product_rule=product_rule)
        state = {key: self.sites[product.name] for key, product in named.items()} | _dropout_keys(program, plan, dropout_key)
        outs, _ = interpreter(program.jaxpr, [*values, *arguments.inputs], state)
        return jax.tree.unflatten(program.out_tree, outs)

    def init(self, key: jax.Array, base: Any, *args: Any, **kwargs: Any) -> Adapters:
        """Returns adapters to begin with: at what the packed weights hold of a low-rank part, else so that they change nothing.

        Args:
          key: a random key.
          base: the frozen parameters, packed by `qjax.quantize` where the policy says so. They are not changed: the adapters of a call
            stand in place of a low-rank part of theirs.
          *args: arguments of the function, to trace it with; shapes are enough.
          **kwargs: keyword arguments of the function.

        Returns:
          A tree of float32 arrays by the parameter's path: A as "a" (kept-like..., r, K), with its stacked axes (layers of a scan, experts)
          full and the other kept ones 1; B as "b" (kept..., r); of DoRA "m" (kept...). K is the product of the contracted axes.

        Raises:
          TypeError: `key` is no key; `base` is a result; arguments of the function are missing.
          ValueError: the policy does not fit the program or the base; a parameter that cannot have an adapter.
        """
        check_key("key", key)
        with called_with(self.fn, [base], args, kwargs):
            arguments, _, plan = self._resolved(base, args, kwargs)
        keys = jax.random.split(key, len(plan))
        return {one.leaf.path: one.begin(k, arguments.params[i]) for k, (i, one) in zip(keys, plan.items(), strict=True)}

    def base_shapes(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what `qjax.quantize` makes of parameters of these shapes, as shapes: for `jax.eval_shape` and `jit(...).lower`."""
        arguments = split_arguments(params, args, kwargs)
        choices = self.policy.resolve(self.programs(arguments))
        packed = [w if c.spec is None else _shapes(c) for c, w in zip(choices, arguments.params, strict=True)]
        return arguments.rebuild(packed, arguments.inputs)[0]

    def attach(self, adapters: Adapters, base: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        """Returns the base with the adapters as low-rank parts of its packed weights, for `qjax.quantized` and `qjax.save`.

        Args:
          adapters: the trained ones.
          base: the frozen parameters.
          *args: arguments of the function, to trace it with; shapes are enough.
          dtype: what the low-rank parts are stored in, float32, float16 or bfloat16 by name or as a dtype; None keeps theirs.
          **kwargs: keyword arguments of the function.

        Returns:
          A tree of parameters; nothing is rounded but, with a `dtype`, A and s B. A float parameter takes its adapter in, as in `merge`.

        Raises:
          ValueError: the adapter of a packed weight has magnitudes (DoRA): merge it; another `dtype`; NaN or infinity in an adapter.
        """
        check_form(adapters)
        name = None if dtype is None else _float_name(dtype)
        with called_with(self.fn, [base], args, kwargs):
            arguments, _, plan = self._resolved(base, args, kwargs)
        check_adapters(adapters, plan)
        check_finished(adapters)
        flat = list(arguments.params)
        for i, one in plan.items():
            if not isinstance(flat[i], QTensor):
                flat[i] = _merged(flat[i], one, adapters)
                continue
            if one.lora.dora:
                raise ValueError(f"the adapter of {one.leaf.path!r} cannot become a low-rank part of a packed weight, for it has "
                                 "magnitudes (DoRA): use .merge(...) or .requantize(...)")  # fmt: skip
            adapter = one.adapter(adapters[one.leaf.path], flat[i])
            flat[i] = flat[i].with_adapter(jax.tree.map(lambda a: a if name is None else a.astype(name), adapter))
        return arguments.rebuild(flat, arguments.inputs)[0]

    def merge(self, adapters: Adapters, base: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns float parameters: W + s B A (of DoRA m times its direction) in float32 and rounded once to the parameter's dtype.

        Args:
          adapters: the trained ones.
          base: the frozen parameters; what is packed without an adapter is dequantized.
          *args: arguments of the function, to trace it with; shapes are enough.
          **kwargs: keyword arguments of the function.

        Returns:
          The tree of parameters that `fn` takes.

        Raises:
          ValueError: NaN or infinity in an adapter.
        """
        check_form(adapters)
        with called_with(self.fn, [base], args, kwargs):
            arguments, _, plan = self._resolved(base, args, kwargs)
        check_adapters(adapters, plan)
        check_finished(adapters)
        merged = [_merged(w, plan.get(i), adapters) for i, w in enumerate(arguments.params)]
        return arguments.rebuild(merged, arguments.inputs)[0]

    def requantize(
        self, adapters: Adapters, base: Any, calibration: Iterable[Any], policy: Policy | None = None
    ) -> Result:
        """Merges, and quantizes what that gives.

        Args:
          adapters: the trained ones.
          base: the frozen parameters.
          calibration: as for `qjax.quantize`.
          policy: what to quantize to; None: as the base, by this function's policy.

        Returns:
          A `Result`. Each row's `error` is that of rounding the merged weight, and a note says how large that is beside what the adapter
          had changed: above 1, rounding moves the weight further than training did.
        """
        batches = as_batches(calibration)
        args = batches[0]
        merged = self.merge(adapters, base, *args)
        result = quantize(self.fn, merged, self.policy if policy is None else policy, batches)
        arguments, _, plan = self._resolved(base, args, {})
        after = split_arguments(merged, args, {}).params
        packed = split_arguments(result.params, args, {}).params
        rows = list(result.report.rows)
        for i in plan:
            if isinstance(packed[i], QTensor):
                share = float(_share(after[i], packed[i], arguments.params[i]))
                note = f"rounding moves it {share:.2g} times as far as its adapter did"
                rows[i] = dataclasses.replace(rows[i], notes=(*rows[i].notes, note))
        return dataclasses.replace(result, report=dataclasses.replace(result.report, rows=tuple(rows)))

    def _resolved(self, base: Any, args: Any, kwargs: Any) -> tuple[Arguments, Program, dict[int, Adapted]]:
        _check_tree(base)
        arguments = split_arguments(base, args, kwargs)
        program = self.programs(arguments)
        plan = adapted(program, self.policy)
        check_base(arguments.params, self.policy, program)
        return arguments, program, plan


def _check_tree(base: Any) -> None:
    if isinstance(base, Result):
        raise TypeError("`base` is a Result, which is no tree of arrays: pass its parameters, result.params")


def _shapes(choice: Choice) -> QTensor:
    """What a parameter is packed to, with what its activations become, as shapes."""
    q, act, leaf = shapes_of(choice), choice.activation, choice.leaf
    if act is None:
        return q
    q = dataclasses.replace(q, act=dataclasses.replace(act, observer=None))
    if not act.static:
        return q
    of_site: Any = jax.ShapeDtypeStruct((1,) * (q.scale.ndim), jnp.float32)
    scale, zero_point = jax.eval_shape(lambda end: [whole_ranges(a, leaf) for a in range_params(end, end, act.spec)], of_site)
    return dataclasses.replace(q, act_scale=scale, act_zero_point=zero_point)


def _float_name(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", dtype))
    check_choice("dtype", name, get_args(AdapterDtype))
    return name


def _merged(w: Any, one: Adapted | None, adapters: Adapters) -> Any:
    if one is not None:
        return one.merged(w, adapters[one.leaf.path])
    return w.dequantize() if isinstance(w, QTensor) else w


@jax.jit
def _share(merged: jax.Array, packed: QTensor, before: Any) -> jax.Array:
    """|rounded - merged| / |merged - before|."""
    before = before.with_adapter(None).dequantize() if isinstance(before, QTensor) else before
    merged, rounded, before = (a.astype(jnp.float32) for a in (merged, packed.dequantize(), before))
    return jnp.linalg.norm((rounded - merged).ravel()) / jnp.maximum(jnp.linalg.norm((merged - before).ravel()), 1e-30)


def _dropout_keys(program: Program, plan: Mapping[int, Adapted], key: jax.Array | None) -> dict[Any, jax.Array]:
    """A key for every site with dropout and every turn of the scans around it."""
    sites = [site for site in program.sites if site.op != "gather" and site.leaf in plan and plan[site.leaf].lora.dropout]
    if key is None or not sites:
        return {}
    lengths = scan_lengths(program)
    keys = jax.random.split(key, len(sites))
    return {site.key: keys_for(k, [lengths[scan] for scan in site.scans]) for k, site in zip(keys, sites, strict=True)}


def qlora(fn: Callable[..., Any], policy: Policy, sites: Mapping[str, QProduct] | None = None) -> QLoRA:
    """Transforms `fn(params, *args)` into a function of (adapters, base, *args) whose packed base is frozen and whose adapters train.

    Rules with `train=qjax.lora(...)` name the parameters that have adapters, wherever they meet data: in products (einsum, heads, experts,
    layers of a scan), convolutions without groups, and lookups; a rule that reaches no site is an error. `base` is what
    `qjax.quantize(fn, params, policy, ...)` gives; a rule without a `weight` has its adapters beside a float parameter (plain LoRA).
    A packed weight is unpacked in front of its product, forward and once more backward, and no float copy of it lives between; its product
    and its integer activations are those of `qjax.quantized`.

    Args:
      fn: any JAX function whose first argument is the tree of parameters; of modules `model.apply` or `qjax.nnx.function(model)`.
      policy: what is packed, and what has adapters.
      sites: `result.sites` of the base, if a rule names products of two activations.

    Returns:
      A function, differentiated with respect to its first argument: jax refuses the second, whose codes are uint8 ("grad requires
      real- or complex-valued inputs"), so pass the base beside, under `argnums=0`.
      `.init(key, base, *args)` gives the adapters, an ordinary tree of float arrays for optax; `dropout_key=` turns dropout on in a call;
      `.merge`, `.requantize` and `.attach` end the training.

    Raises:
      TypeError: `policy` is no policy. When called: adapters with integer or packed leaves; `dropout_key` is no key.
      ValueError: when called: no rule has adapters; a parameter cannot have one; adapters or a base of another policy.

    Example:
      >>> import jax, jax.numpy as jnp, qjax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> policy = qjax.Policy([qjax.Rule("*", weight=qjax.nf4(double_quant=True), train=qjax.lora(2))])
      >>> params, x = {"w": jnp.sin(jnp.arange(512.0)).reshape(64, 8)}, jnp.ones((3, 64))
      >>> base = qjax.quantize(fn, params, policy, calibration=[x]).params
      >>> tuned = qlora(fn, policy)
      >>> adapters = tuned.init(jax.random.key(0), base, x)
      >>> jax.tree.map(jnp.shape, jax.grad(lambda a: tuned(a, base, x).sum())(adapters))
      {'w': {'a': (1, 2, 64), 'b': (8, 2)}}

    Source: QLoRA, Dettmers et al., arXiv 2305.14314, equation 5. The thin products are float32 here.
    """
    check_policy(policy)
    check_function(fn)
    return QLoRA(fn, policy, checked_products(sites))
