"""Which parameters of a program have adapters, of which shapes, and how they begin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core import ActSpec, Adapter, QTensor, Spec, adapter_matrix
from qjax.core.layout import canonicalize, uncanonicalize
from qjax.policy import Choice, Policy
from qjax.program import Leaf, Program
from qjax.runtime.adapter import why_not
from qjax.training.arguments import check_trained
from qjax.training.lora import Lora

# By the parameter's path: {"a": (kept-like..., r, K), "b": (kept..., r)}, and of DoRA "m": (kept...); float32.
Adapters = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A parameter with an adapter.

    Attributes:
      leaf: it.
      lora: how.
    """

    leaf: Leaf
    lora: Lora

    @property
    def axes(self) -> tuple[int, ...]:
        """The contracted axes, negative."""
        return tuple(a - len(self.leaf.shape) for a in self.leaf.sites[0].contracted)

    @property
    def kept(self) -> tuple[int, ...]:
        """The sizes of the kept axes."""
        return tuple(n for i, n in enumerate(self.leaf.shape) if i not in self.leaf.sites[0].contracted)

    @property
    def own(self) -> tuple[int, ...]:
        """The same with 1 for all but stacked axes (layers, experts), of which each element has a matrix A of its own."""
        contracted = self.leaf.sites[0].contracted
        stacked = {axis for site in self.leaf.sites for axis in site.stacked}
        return tuple(n if i in stacked else 1 for i, n in enumerate(self.leaf.shape) if i not in contracted)

    @property
    def inputs(self) -> int:
        """K, how many values are contracted."""
        return math.prod(self.leaf.shape[a] for a in self.leaf.sites[0].contracted)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of its adapter."""
        shapes = {"a": (*self.own, self.lora.rank, self.inputs), "b": (*self.kept, self.lora.rank)}
        return shapes | ({"m": self.kept} if self.lora.dora else {})

    @property
    def looked_up(self) -> bool:
        """Whether rows of it are looked up: an embedding."""
        return any(site.op == "gather" for site in self.leaf.sites)

    def begin(self, key: jax.Array, base: Any) -> dict[str, jax.Array]:
        """How it begins: at the base's own low-rank part, else A at random and B at zero; m at the norms of the two together."""
        found = base.adapter if isinstance(base, QTensor) else None
        if found is None:
            bound = 1 / self.lora.rank if self.lora.init == "gaussian" else 1 / math.sqrt(self.inputs)
            shape = self.shapes["a"]
            wide = self.lora.init == "kaiming"
            a = jax.random.uniform(key, shape, minval=-bound, maxval=bound) if wide else jax.random.normal(key, shape) * bound
            b = jnp.zeros(self.shapes["b"])
            # A lookup reads row v of B, and A is what is common to all rows; PEFT's zeros stand at the side of the rows, as here.
        else:
            if found.left.shape[-1] != self.lora.rank:
                raise ValueError(f"`rank`={self.lora.rank} of the adapters of {self.leaf.path!r} is not that of the low-rank part in its "
                                 f"packed weight, {found.left.shape[-1]}: give both the same")  # fmt: skip
            a = jnp.broadcast_to(found.right.astype(jnp.float32), self.shapes["a"])
            b = found.left.astype(jnp.float32) / self.lora.scaling
            if base.input_scale is not None:
                a = a / base.input_scale[..., None, :]
        parts = {"a": a.astype(jnp.float32), "b": b.astype(jnp.float32)}
        return parts | ({"m": self.norms(base, parts)} if self.lora.dora else {})

    def adapter(self, parts: Mapping[str, Any], base: Any) -> Adapter:
        """s B and A as a packed weight has them: in front of its input scale."""
        left, right = parts["b"] * self.lora.scaling, parts["a"]
        scale = base.input_scale if isinstance(base, QTensor) else None
        return Adapter(left, right if scale is None else right * scale[..., None, :])

    def norms(self, base: Any, parts: Mapping[str, Any]) -> jax.Array:
        """|W + s B A| of every output, (kept...) float32."""
        return jnp.sqrt(jnp.sum(jnp.square(canonicalize(self._sum(base, parts), self.axes)), axis=-1))

    def merged(self, base: Any, parts: Mapping[str, Any]) -> jax.Array:
        """W' as an array of the parameter's shape and dtype, rounded once."""
        w = self._sum(base, parts)
        if self.lora.dora:
            w = canonicalize(w, self.axes)
            norms = jnp.sqrt(jnp.sum(jnp.square(w), axis=-1))
            w = w * ratio(parts["m"], norms)[..., None]
            w = uncanonicalize(w, self.axes, self._sizes)
        return w.astype(self.leaf.dtype)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape[a] for a in self.axes)

    def _sum(self, base: Any, parts: Mapping[str, Any]) -> jax.Array:
        """W + s B A, float32."""
        if isinstance(base, QTensor):
            q = base.with_adapter(self.adapter(parts, base))
            return dataclasses.replace(q, dtype=np.dtype(np.float32)).dequantize()
        change = adapter_matrix(self.adapter(parts, base))
        return jnp.asarray(base).astype(jnp.float32) + uncanonicalize(change, self.axes, self._sizes)


def ratio(m: jax.Array, norms: jax.Array) -> jax.Array:
    """m / |W + s B A|, 1 where the norm is 0."""
    return jnp.where(norms > 0, m / jnp.where(norms > 0, norms, 1.0), 1.0)


def adapted(program: Program, policy: Policy) -> dict[int, Adapted]:
    """Resolves a policy for adapters.

    Returns:
      An `Adapted` by the parameter's index.

    Raises:
      ValueError: as `Policy.resolve`; no rule trains adapters, or those that do reach no parameter; a parameter cannot have one; a rule
        trains through rounding.
    """
    found = {}
    choices = policy.resolve(program)
    for choice in choices:
        train = None if choice.rule is None else choice.rule.train
        if isinstance(train, Lora):
            _check(choice, train)
            found[choice.leaf.index] = Adapted(choice.leaf, train)
    if not found:
        some = next((choice.leaf.path for choice in choices if choice.leaf.sites), None)
        hint = "its parameters meet no data" if some is None else f"write a rule such as Rule({some!r}, train=qjax.lora(16))"
        raise ValueError(f"`policy` has no rule whose adapters reach a site of the program{_through_rounding(policy)}: {hint}")
    for choice in choices:
        rule = choice.rule
        if rule is not None and rule.train is not None and not isinstance(rule.train, Lora):
            raise ValueError(f"`policy` trains {choice.leaf.path!r} through rounding by {rule.train!r}, and beside adapters the base is "
                             f"frozen: leave `train` out of the rule for {rule.pattern!r}, or give it qjax.lora(rank)")  # fmt: skip
    return found


def _through_rounding(policy: Policy) -> str:
    """Of a policy that is for another kind of training: which."""
    rule = next((rule for rule in policy.rules if rule.train is not None and not isinstance(rule.train, Lora)), None)
    return "" if rule is None else f" (that for {rule.pattern!r} trains through rounding by {rule.train!r}, which is for qjax.fake_quant)"


def _check(choice: Choice, train: Lora) -> None:
    leaf = choice.leaf
    reason = _refusal(leaf, train)
    if reason:
        raise ValueError(f"{leaf.path!r} cannot have an adapter: {reason}; put a rule without `train` for it in front")
    one = Adapted(leaf, train)
    outputs = math.prod(one.kept) // math.prod(one.own)
    if train.rank > min(one.inputs, outputs):
        raise ValueError(f"`rank`={train.rank} is more than a matrix of {outputs} outputs and {one.inputs} inputs has, those of "
                         f"{leaf.path!r}: take at most {min(one.inputs, outputs)}")  # fmt: skip


def _refusal(leaf: Leaf, train: Lora) -> str:
    """Why a parameter cannot have an adapter; "" if it can."""
    others = [name for name in leaf.consumers if not name.startswith("output")]
    if any(site.groups > 1 for site in leaf.sites):
        return "the groups of its convolution have inputs of their own"
    if any(site.custom_rule for site in leaf.sites):
        return "it is used inside a custom derivative rule"
    if any(site.sharded for site in leaf.sites):
        return "it is used inside a shard_map (transform the function that is mapped)"
    if others:
        return f"it is also read by {', '.join(others)}"
    if train.dora and any(site.op == "gather" for site in leaf.sites):
        return "a lookup has no magnitudes, so DoRA has no form for it (dora=False has)"
    if train.dora and any(why_not(site) for site in leaf.sites if site.op == "dot_general"):
        return "DoRA needs the norms of whole outputs, and it is contracted over a part of its axes (dora=False has no such need)"
    if len({site.contracted for site in leaf.sites}) > 1:
        return "its sites contract different axes"
    return ""


_WHAT = "`adapters` must be what .init(key, base, ...) gave: the packed base is the second argument and never trained"


def check_form(adapters: Any) -> None:
    """Refuses what no adapters of any policy look like, before anything is traced with it.

    Raises:
      TypeError: naming the argument.
    """
    packed = any(map(_is_q, jax.tree.leaves(adapters, is_leaf=_is_q)))
    if packed or not isinstance(adapters, Mapping) or not all(isinstance(parts, Mapping) and "a" in parts for parts in adapters.values()):
        raise TypeError(f"{_WHAT}; got {'a tree with packed leaves' if packed else type(adapters).__name__}")


def check_adapters(adapters: Any, plan: Mapping[int, Adapted]) -> None:
    """Refuses a tree that is not the adapters of this program and policy.

    Raises:
      TypeError: leaves that are not floating.
      ValueError: paths or shapes of another policy or program.
    """
    wanted = {one.leaf.path: one for one in plan.values()}
    for names, what in ((adapters.keys() - wanted.keys(), "holds"), (wanted.keys() - adapters.keys(), "lacks")):
        if names:
            raise ValueError(f"`adapters` {what} {sorted(names)[0]!r}, and the policy has adapters for {', '.join(list(wanted)[:3])}: "
                             "the policy or the program is not that of .init(...)")  # fmt: skip
    for path, one in wanted.items():
        parts, shapes = adapters[path], one.shapes
        got = {name: tuple(x.shape) for name, x in parts.items()}
        if got != shapes:
            raise ValueError(f"`adapters` of {path!r} have shapes {got}, and the policy wants {shapes}: train with that of .init(...)")
        for name, x in parts.items():
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"`adapters` {path!r} {name!r} is {x.dtype}, not floating: {_WHAT}")


def check_finished(adapters: Adapters) -> None:
    """Refuses NaN and infinity in adapters that end their training.

    Raises:
      ValueError: naming the parameter and the array.
    """
    for path, parts in adapters.items():
        for name, x in parts.items():
            check_trained(x, f"`adapters` {path!r} {name!r}")


def check_base(flat: Sequence[Any], policy: Policy, program: Program) -> None:
    """Refuses a base that is not packed as the policy says, where it has adapters and where it has none. Looks at no number.

    Raises:
      ValueError: naming the parameter.
    """
    for choice in policy.resolve(program):
        w, spec, path = flat[choice.leaf.index], choice.spec, choice.leaf.path
        if spec is not None and not isinstance(w, QTensor):
            raise ValueError(f"`base` leaf {path!r} is float, and its rule says {spec}: give the parameters of "
                             "qjax.quantize(fn, params, policy, ...), or leave `weight` out of the rule")  # fmt: skip
        if not isinstance(w, QTensor):
            continue
        if spec is None:
            raise ValueError(f"`base` leaf {path!r} is packed to {w.spec}, and the policy leaves it float: {_SAME}")
        if _grid(w.spec) != _grid(spec):
            raise ValueError(f"`base` leaf {path!r} is packed to {w.spec}, and its rule says {spec}: {_SAME}")
        if _kind(w.act) != _kind(choice.activation):
            raise ValueError(f"`base` leaf {path!r} is packed for activations {w.act}, and its rule says {choice.activation}: {_SAME}")


_SAME = "give the policy that the base was quantized by, or the parameters of qjax.quantize(fn, params, policy, ...)"


def _grid(spec: Spec) -> tuple[type, dict[str, Any]]:
    """A spec without what `qjax.prepack` may change of it: how scales are stored."""
    stored = ("scale_dtype", "double_quant", "exponent_rule")
    return type(spec), {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in stored}


def _kind(act: ActSpec | None) -> Any:
    """What of activations a packed weight keeps in any case: how their range is found is over."""
    return None if act is None else (act.spec, act.static, act.per_token)


def _is_q(x: Any) -> bool:
    return isinstance(x, QTensor)
