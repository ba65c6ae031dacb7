"""`fake_quant`: trains through the rounding that the packed model will have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.calibration import as_batches
from qjax.core import QTensor, check_key
from qjax.core.specs import check_choice
from qjax.graph import BatchNormFolds
from qjax.graph.batch_norm_folds import check_folds, scaled
from qjax.policy import Policy, check_policy
from qjax.program import Key, ProgramCache, check_function, split_arguments
from qjax.ptq.data import check_numbers, check_same_sites
from qjax.report import Report
from qjax.training.arguments import ONCE, called_with, check_form, check_places, check_rows, in_form_of
from qjax.training.estimator import TracksRanges
from qjax.training.freezing import recorded, standing
from qjax.training.from_packed import adopted
from qjax.training.integer_forward import check_any, forward_report, integer_weights, outcomes
from qjax.training.planned import Planned, planned
from qjax.training.qat import training_of
from qjax.training.rounding import followed, rounded_weight, rounding
from qjax.training.state import MISSING, UNKNOWN, Quant, advance, begin, carried, check, labels, ranges, shapes, uncalibrated

Forward = Literal["float", "integer"]


@dataclasses.dataclass(frozen=True, eq=False)
class FakeQuant:
    """A function of float parameters that computes with fake-quantized ones. Built by `fake_quant`.

    Attributes:
      fn: the float function.
      policy: which parameters are fake-quantized.
      forward: on what forward products are computed; None: on what is faster.
      folds: the batch norms that are folded in every step; None: none.
      missing: what a call without a state that it needs is told.
      unknown: what a call with a state without ranges is told.
    """

    fn: Callable[..., Any]
    policy: Policy
    forward: Forward | None = None
    folds: BatchNormFolds | None = None
    missing: str = MISSING
    unknown: str = UNKNOWN

    @functools.cached_property
    def programs(self) -> ProgramCache:
        return ProgramCache(self.fn)

    @property
    def _on_integers(self) -> bool:
        return self.forward == "integer" or (self.forward is None and jax.default_backend() == "cpu")

    def plan(self, params: Any, *args: Any, **kwargs: Any) -> Planned:
        """What is rounded in the program of these arguments."""
        check_places(self.fn, params, args, kwargs)
        with called_with(self.fn, [params], args, kwargs):
            program = self.programs(split_arguments(params, args, kwargs))
        return planned(program, self.policy, self.folds)

    def __call__(self, params: Any, *args: Any, quant: Quant | None = None, **kwargs: Any) -> Any:
        plan = self.plan(params, *args, **kwargs)
        state = check(quant, plan, missing=self.missing, unknown=self.unknown)
        return self._computed(plan, state, False, params, args, kwargs)[0]

    def tracked(self, params: Any, *args: Any, quant: Quant | None = None, **kwargs: Any) -> tuple[Any, Quant]:
        """Computes as the function does, with ranges that follow the data (`qjax.moving_range`).

        Args:
          params: the float parameters.
          *args: arguments of the function.
          quant: the state; ranges that follow may be unknown yet, as `init` gives them for shapes.
          **kwargs: keyword arguments of the function.

        Returns:
          (results, the state with the ranges that were used). Hand the state out of the loss beside it
          (`jax.value_and_grad(..., has_aux=True)`), and apply the updates of what is learned to it.

        Raises:
          ValueError: no rule has ranges that follow; the state is missing or of another policy; `forward` is "integer", whose codes are
            rounded with the range that a site has before it is run.
        """
        plan = self.plan(params, *args, **kwargs)
        if not _follows(plan):
            raise ValueError("`policy` has no ranges that follow the data: give a rule train=qjax.moving_range(), or call the function "
                             "itself")  # fmt: skip
        state = check(quant, plan, known="still", missing=self.missing, unknown=self.unknown)
        out, state = self._computed(plan, state, True, params, args, kwargs)
        return out, in_form_of(quant, state)

    def stepped(self, params: Any, *args: Any, quant: Quant | None, **kwargs: Any) -> tuple[Any, Quant]:
        """As `tracked`, and as the function itself where no range follows the data: what modules call."""
        plan = self.plan(params, *args, **kwargs)
        follows = quant is not None and _follows(plan)
        state = check(quant, plan, known="still" if follows else "all", missing=self.missing, unknown=self.unknown)
        out, state = self._computed(plan, state, follows, params, args, kwargs)
        return out, in_form_of(quant, state) if quant is not None else state

    def report(self, params: Any, *args: Any, **kwargs: Any) -> Report:
        """Says on what the forward product of each weight runs in training, integers or floats, and why; computes nothing.

        Args:
          params: the float parameters; shapes are enough, here and below.
          *args: arguments of the function.
          **kwargs: keyword arguments of the function.

        Returns:
          A `Report`, whose rows' `kernel` is "xla int8" or "xla", of floats, and whose `kernel_reasons` and `notes` say why floats.

        Raises:
          ValueError: the policy does not fit the program.

        Example:
          >>> import jax, jax.numpy as jnp, qjax
          >>> act = qjax.dynamic(qjax.int8())
          >>> rules = [qjax.Rule("a", weight=qjax.int4(), activation=act), qjax.Rule("b", weight=qjax.int4(group_size=2), activation=act)]
          >>> fq = qjax.fake_quant(lambda p, x: x @ p["a"] @ p["b"], qjax.Policy(rules), forward="integer")
          >>> report = fq.report({"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2))}, jnp.ones((3, 4)))
          >>> [(row.path, row.kernel, row.kernel_reasons) for row in report.rows][0], report.rows[1].kernel_reasons[0][:42]
          (('a', 'xla int8', ()), 'weights of int4(group_size=2) share scales')
        """
        plan, ran = self.plan(params, *args, **kwargs), dict[Key, str]()
        arguments = split_arguments(params, args, kwargs)

        def run(params: Any, inputs: Any, quant: Quant) -> Any:
            tree, args, kwargs = arguments.rebuild(params, inputs)
            return self._run(plan, quant, False, tree, args, kwargs, ran)[0]

        if self._on_integers:
            jax.eval_shape(run, arguments.params, arguments.inputs, shapes(plan))
            return forward_report(plan, outcomes(plan, ran), "")
        why = "`forward` is 'float'" if self.forward == "float" else f"`forward` is None, and floats are faster on {jax.default_backend()}"
        return forward_report(plan, {}, f"all forward products are of floats: {why}")

    def _computed(self, plan: Planned, quant: Quant, tracks: bool, params: Any, args: Any, kwargs: Any) -> tuple[Any, Quant]:
        """Runs the program; one that was asked for integers, and has none, does not pass for it."""
        if tracks and self.forward == "integer":
            raise ValueError("`forward`='integer' and ranges that follow the data do not go together: codes would be rounded with the "
                             "range that a site has before it is run; leave `forward` out, or write 'float'")  # fmt: skip
        ran: dict[Key, str] = {}
        done = self._run(plan, standing(quant), tracks, params, args, kwargs, ran)
        if self.forward == "integer":
            check_any(plan, outcomes(plan, ran))
        return done

    def _run(
        self, plan: Planned, quant: Quant, tracks: bool, params: Any, args: Any, kwargs: Any, ran: MutableMapping[Key, str]
    ) -> tuple[Any, Quant]:
        weights = _weights(plan, params, quant)
        on_integers = self._on_integers and not tracks
        exact = integer_weights(plan, split_arguments(params, (), {}).params, quant) if on_integers else {}
        run = rounding(plan, quant, exact, tracks, ran)
        if run is None:
            return self.fn(weights, *args, **kwargs), quant
        flat = split_arguments(weights, args, kwargs)
        outs, side = run([*flat.params, *flat.inputs])
        return jax.tree.unflatten(plan.program.out_tree, outs), followed(plan, quant, side) if tracks else quant

    def init(self, key: jax.Array, params: Any, *args: Any, **kwargs: Any) -> Quant:
        """Returns the state of the quantizers, to be passed as `quant=` and trained beside the parameters.

        It holds learned scales by the parameter's path, the ranges of static activations, and, with a schedule or random rounding, the
        step and a seed: a tree of float32 arrays, to be trained, saved, stacked and sharded as any other. The name of an entry of it says
        of which policy it is, and with another one it is refused. Rounding to nearest with ranges from the extreme values has none: the
        state is an empty tree.

        Args:
          key: a random key, for the seed.
          params: the float parameters.
          *args: arguments of the function. The ranges of static activations begin with these data; of shapes
            (`jax.ShapeDtypeStruct`) they stay unknown until `calibrate`, and the state says so by an entry "uncalibrated": nothing is
            computed with it before.
          **kwargs: keyword arguments of the function.

        Returns:
          A tree of arrays.

        Raises:
          TypeError: `key` is no key; arguments of the function are missing.
          ValueError: the policy does not fit the program.
        """
        return self._begun(key, params, {}, args, kwargs)

    def _begun(self, key: jax.Array, params: Any, learned: Quant, args: Any, kwargs: Any) -> Quant:
        check_key("key", key)
        plan = self.plan(params, *args, **kwargs)
        arguments = split_arguments(params, args, kwargs)
        _check_float(plan, arguments.params)
        if any(isinstance(w, jax.ShapeDtypeStruct) for w in arguments.params) and shapes(plan):
            raise TypeError("`params` holds shapes, and a state begins with numbers: give the parameters; for the shapes of a state write "
                            "jax.eval_shape(fq.init, key, params, *args)")  # fmt: skip
        state = begin(plan, key, _folded(plan, arguments.params), learned)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in arguments.inputs):
            return uncalibrated(plan, state)
        return self._calibrated(state, plan, params, [(plan.program, arguments.inputs)])

    def from_packed(self, key: jax.Array, packed: Any, *args: Any, params: Any, **kwargs: Any) -> tuple[Any, Quant]:
        """Returns float parameters and a state with which training begins at what a method after training found.

        The function of both computes with the weights of `packed`, bit for bit but for the last bit of floating zero points, where
        rounding `params` would begin anew.

        Args:
          key: as for `init`.
          packed: the parameters that `qjax.quantize` gave for the same rules: `result.params`. Static ranges of activations are not taken
            from it: they begin with the data, as in `init`.
          *args: as for `init`.
          params: the float parameters from which they were made; the new ones are the nearest to them that round to the codes.
          **kwargs: keyword arguments of the function.

        Returns:
          (parameters, state): pass them as what `init` was given and has given.

        Raises:
          TypeError: `key` is no key; arguments of the function are missing.
          ValueError: another tree; a leaf has another spec than the policy trains, belongs to an estimator that takes its range from the
            weights (`qjax.lsq` does not), has a schedule of weights or bits, is rotated, rescaled, or has groups of reordered columns; the
            function folds batch norms.

        Example:
          >>> import jax, jax.numpy as jnp, qjax
          >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.linspace(-1, 1, 8).reshape(4, 2)}, jnp.eye(4)
          >>> result = qjax.quantize(fn, params, qjax.Policy([qjax.Rule("*", weight=qjax.int2(), method=qjax.gptq())]), [x])
          >>> fq = qjax.fake_quant(fn, qjax.Policy([qjax.Rule("*", weight=qjax.int2(), train=qjax.lsq())]))
          >>> begun, quant = fq.from_packed(jax.random.key(0), result.params, x, params=params)
          >>> bool((fq(begun, x, quant=quant) == result.params["w"].dequantize()).all())
          True
        """
        check_key("key", key)
        if self.folds is not None:
            raise ValueError("`folds` and from_packed do not go together: the codes of `packed` are of weights that are not folded; leave "
                             "`folds` out, or begin with `init`")  # fmt: skip
        structures = [jax.tree.structure(tree, is_leaf=lambda x: isinstance(x, QTensor)) for tree in (packed, params)]
        if structures[0] != structures[1]:
            raise ValueError("`packed` is another tree than `params`: give result.params of qjax.quantize for these parameters")
        plan = self.plan(params, *args, **kwargs)
        arguments, given = split_arguments(params, args, kwargs), split_arguments(packed, (), {})
        _check_float(plan, arguments.params)
        if not any(isinstance(leaf, QTensor) for leaf in given.params):
            raise ValueError("`packed` holds nothing that is packed: give result.params of qjax.quantize, or begin with `init`")
        new, learned = adopted(plan, given.params, arguments.params)
        begun = given.rebuild(new, [])[0]
        return begun, self._begun(key, begun, learned, args, kwargs)

    def calibrate(self, quant: Quant, params: Any, batches: Iterable[Any]) -> Quant:
        """Returns the state with the ranges of static activations and products as these data have them, by their specs' observers.

        Args:
          quant: the state.
          params: the float parameters; activations are those of the rounded weights, and float themselves.
          batches: as for `qjax.quantize`.

        Returns:
          A state; what weights have learned, step and seed are as they were. Ranges that a schedule has frozen are those of these data.

        Raises:
          TypeError: `quant` is no state, or `batches` no list of batches.
          ValueError: no data, other sites, NaN or infinity.
        """
        check_form(quant)
        check_places(self.fn, params, (), {})
        arguments = [split_arguments(params, batch, {}) for batch in as_batches(batches, "batches")]
        check_rows(arguments)
        streams = [(self.programs(a), a.inputs) for a in arguments]
        check_numbers(streams, "the range of static activations")
        check_same_sites(streams)
        plan = planned(streams[0][0], self.policy, self.folds)
        state = self._calibrated(check(quant, plan, known="none"), plan, params, streams)  # without the mark that data were missing
        return in_form_of(quant, state) if quant.keys() == state.keys() else state

    def _calibrated(self, quant: Quant, plan: Planned, params: Any, streams: Any) -> Quant:
        weights = split_arguments(_weights(plan, params, standing(quant)), (), {}).params
        found = ranges(plan, streams, weights)
        return recorded({name: found.get(name, value) for name, value in quant.items()}, found)

    def advance(self, quant: Quant) -> Quant:
        """Returns the state of the next step: schedules go on, and random rounding draws anew. Call it once after each update.

        What an update did to numbers that the `freeze` of a schedule holds is undone. They are held whether it is called or not: a step
        computes with the copies in the state, and `qjax.convert` packs them.
        """
        return advance(quant)

    def carried(self, quant: Quant, begun: Quant) -> Quant:
        """Returns the state of this policy with what was learned under another: a schedule is extended, a rule for a new head comes in.

        Scales are taken as they are: for other bits begin anew, or with `from_packed`.

        Args:
          quant: the state of another policy of the same parameters.
          begun: what `init` gives for this one.

        Returns:
          `begun` with the learned numbers, ranges, step and seed of `quant`, where both have them in the same shape. What a schedule
          freezes is held as it is now.

        Raises:
          TypeError: one of them is no state.
          ValueError: they have nothing in common.

        Example:
          >>> import jax, jax.numpy as jnp, qjax
          >>> def of(freeze):
          ...     train = qjax.qat(qjax.lsq(), schedule=qjax.schedule(freeze=freeze))
          ...     return qjax.fake_quant(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", weight=qjax.int4(), train=train)]))
          >>> params, x, key = {"w": jnp.eye(4)}, jnp.eye(4), jax.random.key(0)
          >>> quant = of(10).advance(of(10).init(key, params, x))
          >>> longer = of(20).carried(quant, of(20).init(key, params, x))
          >>> longer["step"].item(), of(20)(params, x, quant=longer).shape
          (1.0, (4, 4))
        """
        return carried(quant, begun)

    def labels(self, quant: Quant) -> Any:
        """Returns "learned" or "fixed" for every array of the state, for `optax.multi_transform`."""
        return labels(quant)

    def leaves(self, params: Any, *args: Any, quant: Quant | None = None, **kwargs: Any) -> Callable[[Any], Any]:
        """Finds the sites, and returns the function that fake-quantizes a tree of parameters."""
        plan = self.plan(params, *args, **kwargs)
        state = check(quant, plan, missing=self.missing, unknown=self.unknown)
        return lambda params: _weights(plan, params, standing(state))


def _follows(plan: Planned) -> bool:
    """Whether a range of the program follows the data."""
    trains = [t.train for t in plan.weights.values()] + [training_of(choice.rule) for choice in plan.products]
    return any(isinstance(train.activation, TracksRanges) for train in trains)


def _check_float(plan: Planned, params: Any) -> None:
    for index, trained in plan.weights.items():
        if isinstance(params[index], QTensor):
            raise TypeError(f"`params` leaf {trained.leaf.path!r} is packed, {params[index]!r}: integers have no gradient; train the float "
                            "parameters and pack them with qjax.convert, or leave this leaf out of the policy")  # fmt: skip


def _weights(plan: Planned, params: Any, quant: Quant) -> Any:
    """The tree of parameters with rounded weights."""
    arguments = split_arguments(params, (), {})
    _check_float(plan, arguments.params)
    factors = plan.factors(arguments.params)
    new = [
        rounded_weight(w, plan.weights[i], quant, factors.get(i)) if i in plan.weights else w for i, w in enumerate(arguments.params)
    ]
    return arguments.rebuild(new, [])[0]


def _folded(plan: Planned, leaves: Sequence[Any]) -> list[Any]:
    """Flat parameters with weights as they are rounded."""
    factors = plan.factors(leaves)
    return [scaled(jnp.asarray(w), factors[i]) if i in factors else w for i, w in enumerate(leaves)]


def fake_quant(
    fn: Callable[..., Any], policy: Policy, forward: Forward | None = None, folds: BatchNormFolds | None = None
) -> FakeQuant:
    """Transforms `fn(params, *args)` so that it computes with rounded weights and trains the float ones.

    Forward, a weight is `dequantize(quantize(w))`, bit for bit what the packed model will hold (a rule's `method` chooses codes
    after training; here every rule rounds to nearest, where it is rotated with `qjax.online_rotation`). The activations of a rule
    that names them, and both operands of a product of two activations that a rule names, are rounded as the packed model's integers
    are. Backward, the estimator of the rule's `train`; without one straight through: the gradient passes where
    q_min <= w / scale <= q_max and is zero outside, see `straight_through`. What is learned beside the weights is in a state of its own,
    see `FakeQuant.init`; `qjax.convert` packs what was trained.

    Args:
      fn: any JAX function whose first argument is the tree of float parameters.
      policy: which parameters are fake-quantized, to what, and how they train. Its rules for caches count where `fn` takes one (see
        `qjax.quantized_cache`): it stays float, and is read as the packed cache is, with the gradient of what was written.
      forward: "float"; "integer": products of rounded weights and rounded activations run on their codes, int8 x int8 -> int32, as
        the packed model's do, where whole rows share a scale and no schedule or random rounding is in the way. Others stay float, and
        `fq.report(params, *args)` names them; where all would, it is an error. The result differs by float rounding only, gradients are
        those of the float product. None: integers where there are some on a CPU, where they were measured to be faster, else "float".
      folds: from `qjax.batch_norm_folds`: the weights in front of these batch norms are rounded as the folded network's, in every step
        from its parameters and statistics; their products are of floats. Weights that the policy leaves float are not folded.

    Returns:
      A function with the same arguments and results that composes with `jit`, `grad`, `vmap`, `scan` and `shard_map`. Policies with
      learned or static ranges, a schedule or random rounding have a state: `quant = fq.init(key, params, *args)`, passed as
      `quant=`; `fq.advance(quant)` goes to the next step, `fq.calibrate(quant, params, batches)` sets static ranges, `fq.tracked(...)`
      also returns ranges that follow the data, `fq.labels(quant)` tells what to train.

    Raises:
      TypeError: `policy` is no policy, `folds` something else, or `fn` fake-quantized already. When called: a parameter that the policy
        rounds is packed already, or the state is not float32.
      ValueError: when called, a state that is missing, or of another policy; parameters that lack what `folds` need, or a policy that
        rounds no weight of theirs; a `forward` of "integer" where no product runs on integers.

    Example:
      >>> import jax, jax.numpy as jnp, optax, qjax
      >>> fq = fake_quant(lambda p, x: x @ p["w"], qjax.Policy([qjax.Rule("*", weight=qjax.int4())]))
      >>> params = {"w": jnp.array([[0.2], [-1.5]])}
      >>> fq(params, jnp.eye(2)).tolist()
      [[0.20000000298023224], [-1.600000023841858]]
      >>> jax.grad(lambda p: fq(p, jnp.ones((1, 2))).sum())(params)["w"].tolist()
      [[1.0], [1.0]]

      With learned scales and static ranges of activations:

      >>> rule = qjax.Rule("*", weight=qjax.int4(), activation=qjax.static(qjax.int8()), train=qjax.lsq())
      >>> fq = fake_quant(lambda p, x: x @ p["w"], qjax.Policy([rule]))
      >>> quant = fq.init(jax.random.key(0), params, jnp.eye(2))
      >>> by_params, by_quant = jax.grad(lambda p, q: fq(p, jnp.ones((1, 2)), quant=q).sum(), argnums=(0, 1))(params, quant)
      >>> jax.tree.map(jnp.shape, by_quant)
      {'activations': {'w': {'scale': (1, 1)}}, 'policy': {'x...': ()}, 'weights': {'w': {'scale': (1, 1)}}}

    Source: Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877; see also the estimators.
    """
    check_function(fn)
    if isinstance(fn, FakeQuant):
        raise TypeError(f"`fn` {ONCE}")
    check_policy(policy)
    check_choice("forward", forward, ("float", "integer", None))
    check_folds(folds)
    return FakeQuant(fn, policy, forward, folds)
