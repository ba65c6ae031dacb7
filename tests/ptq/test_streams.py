"""The float program beside the quantized one: what a method that asks for it is given, and what it costs."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibration import Rows
from qjax.ptq.method import needs_float
from qjax.ptq.rtn import rtn
from tests.program.cases import normal

WIDTH, ROWS, LAYERS = 8, 6, 3
PARAMS = {"layers": {"a": normal(LAYERS, WIDTH, WIDTH, seed=1), "b": normal(LAYERS, WIDTH, WIDTH, seed=2)}, "out": normal(WIDTH, 4, seed=3)}


def fn(p, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["a"]) @ w["b"], None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["out"]


def data():
    return [normal(ROWS, WIDTH, seed=10), normal(ROWS + 3, WIDTH, seed=11), normal(ROWS, WIDTH, seed=12)]


@dataclasses.dataclass(frozen=True)
class BothSums:
    """Sums the columns of both programs' rows."""

    def init(self, stack: int, columns: int) -> Any:
        return jnp.zeros((2, stack, columns))

    def update(self, state: Any, rows: Rows) -> Any:
        other = jnp.full_like(rows.x, jnp.inf) if rows.reference is None else rows.reference
        return state + jnp.stack([rows.x.sum(1), other.sum(1)])

    def merge(self, a: Any, b: Any) -> Any:
        return a + b


@dataclasses.dataclass(frozen=True, eq=False)
class Watching:
    """Rounds, and keeps what it was given."""

    seen: list[Any]
    needs_float: bool = True
    name: str = "watching"
    observer: Any = BothSums()

    def shapes(self, problem):
        return rtn().shapes(problem)

    def quantize(self, problem, state):
        self.seen.append((problem.name, np.asarray(state)))
        return rtn().quantize(problem, None)


def policy(method, where="*"):
    return qjax.Policy([qjax.Rule(where, weight=qjax.int2(), method=method)])


def sums(p, x):
    """The sum of each site's rows, in data-flow order, in one plain program."""
    found = []
    for a, b in zip(p["layers"]["a"], p["layers"]["b"], strict=True):
        h = jnp.tanh(x @ a)
        found += [x.sum(0), h.sum(0)]
        x = x + h @ b
    return [*found, x.sum(0)]


def total(p):
    return np.stack([np.sum(each, axis=0) for each in zip(*(sums(p, x) for x in data()), strict=True)])


def test_a_method_that_asks_sees_the_float_program_row_by_row_at_every_site():
    method = Watching([])
    result = qjax.quantize(fn, PARAMS, policy(method), data())
    assert [name for name, _ in method.seen] == ["layers/a", "layers/b"] * LAYERS + ["out"]
    quantized, floats = np.stack([state for _, state in method.seen])[:, :, 0].swapaxes(0, 1)
    chex.assert_trees_all_close(floats, total(PARAMS), rtol=1e-4, atol=1e-4)
    rounded = jax.tree.map(lambda q: q.dequantize(), result.params, is_leaf=lambda q: isinstance(q, qjax.QTensor))
    chex.assert_trees_all_close(quantized, total(rounded), rtol=1e-4, atol=1e-4)
    assert np.abs(quantized - floats)[2:].max() > 0.1


def test_what_was_rounded_beforehand_is_float_in_the_float_program():
    method = Watching([])
    mixed = qjax.Policy([qjax.Rule("*out", weight=qjax.int2(), method=method), qjax.Rule("*", weight=qjax.int2())])
    qjax.quantize(fn, PARAMS, mixed, data())
    [(_, state)] = method.seen
    chex.assert_trees_all_close(state[1, 0], total(PARAMS)[-1], rtol=1e-4, atol=1e-4)
    assert np.abs(state[0, 0] - state[1, 0]).max() > 0.1


def test_nothing_is_kept_for_it_when_nobody_asks():
    method = Watching([], needs_float=False)
    plain = qjax.quantize(fn, PARAMS, policy(method), data()).report.memory["live"]
    asking = qjax.quantize(fn, PARAMS, policy(Watching([])), data()).report.memory["live"]
    assert 1.5 * plain < asking <= 2 * plain
    assert all(np.isinf(state[1]).all() for _, state in method.seen)
    planned = [qjax.plan(fn, PARAMS, policy(m), data(), rates=qjax.Rates(1, 1)) for m in (Watching([]), method)]
    assert planned[0].live == 2 * planned[1].live and planned[0].passes == planned[1].passes + 1
    assert not needs_float(qjax.gptq()) and not needs_float(qjax.awq())
    assert needs_float(qjax.awq(then=Watching([]))) and needs_float(qjax.smoothquant(then=Watching([])))


def test_the_float_program_ends_with_the_last_site_that_asks():
    early, late = Watching([]), Watching([])
    after = qjax.Rule("*", weight=qjax.int2(), method=qjax.gptq())
    results = [
        qjax.quantize(
            unrolled, UNROLLED, qjax.Policy([qjax.Rule(f"*{where}", weight=qjax.int2(), method=method), after]), data()
        ).report.memory["live"]
        for where, method in (("0", early), ("3", late))
    ]
    assert results[0] < results[1] and len(early.seen) == len(late.seen) == 1


UNROLLED = [normal(WIDTH, WIDTH, seed=20 + i) for i in range(4)]


def unrolled(p, x):
    for w in p:
        x = jnp.tanh(x @ w)
    return x


def test_spilling_changes_nothing(tmp_path):
    plain, spilled = Watching([]), Watching([])
    qjax.quantize(unrolled, UNROLLED, policy(plain), data())
    result = qjax.quantize(unrolled, UNROLLED, policy(spilled), data(), spill=qjax.Spill(0, tmp_path))
    for (_, a), (_, b) in zip(plain.seen, spilled.seen, strict=True):
        np.testing.assert_array_equal(a, b)
    assert result.report.memory["spilled"] > 0 and list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class Cross:
    """x^T x_float: the same for any order of the rows, as long as it is one order."""

    def init(self, stack: int, columns: int) -> Any:
        return jnp.zeros((columns, columns))

    def update(self, state: Any, rows: Rows) -> Any:
        return state + rows.x[0].T @ rows.reference[0]

    def merge(self, a: Any, b: Any) -> Any:
        return a + b


EXPERTS = {"router": normal(WIDTH, 4, seed=30), "up": normal(WIDTH, WIDTH, seed=31), "experts": normal(4, WIDTH, 6, seed=32)}


def routed(p, x):
    """Two experts a token; rows are sorted by their expert."""
    x = jnp.tanh(x @ p["up"])
    gate, expert = jax.lax.top_k(x @ p["router"], 2)
    order = jnp.argsort(expert.reshape(-1) + 0.0, stable=True)
    rows = (x[:, None] * jax.nn.sigmoid(gate)[..., None]).reshape(-1, WIDTH)[order]
    return jax.lax.ragged_dot(rows, p["experts"], jnp.bincount(expert.reshape(-1), length=4))


def test_the_float_program_goes_to_the_experts_that_the_quantized_one_chooses():
    """Row for row both read the same token of the same expert, with the float program's own values and gates."""
    method, x = Watching([], observer=Cross()), data()[1]
    only = [qjax.Rule("experts", weight=qjax.int2(), method=method), qjax.Rule("router", weight=None), qjax.Rule("*", weight=qjax.int2())]
    result = qjax.quantize(routed, EXPERTS, qjax.Policy(only), [x])
    up = result.params["up"].dequantize()
    quantized, floats = (jnp.tanh(x @ w) for w in (up, EXPERTS["up"]))
    _, expert = jax.lax.top_k(quantized @ EXPERTS["router"], 2)
    assert (expert != jax.lax.top_k(floats @ EXPERTS["router"], 2)[1]).any()  # else this shows nothing
    gates = (jax.nn.sigmoid(jnp.take_along_axis(h @ EXPERTS["router"], expert, 1)) for h in (quantized, floats))
    both = [(h[:, None] * gate[..., None]).reshape(-1, WIDTH) for h, gate in zip((quantized, floats), gates, strict=True)]
    [(_, state)] = method.seen
    chex.assert_trees_all_close(state, np.asarray(both[0].T @ both[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_experts_inside_scanned_layers_are_seen_layer_by_layer_where_they_stand():
    """Both forms of experts; each layer behind the quantized ones before it, none pooled over the turns of the loop."""

    def layer(x, w):
        expert = jnp.argmax(x @ w["router"], axis=-1)
        order = jnp.argsort(expert, stable=True)
        sent = jax.lax.ragged_dot(x[order], w["ragged"], jnp.bincount(expert, length=2))
        x = x + jnp.tanh(jnp.zeros_like(x).at[order].set(sent))
        dense = jnp.einsum("te,td,edf->tf", jax.nn.softmax(x @ w["gate"]), x, w["stacked"])
        return x + jnp.tanh(dense), None

    small = {name: normal(LAYERS, WIDTH, 2, seed=40 + i) for i, name in enumerate(("router", "gate"))}
    params = small | {name: normal(LAYERS, 2, WIDTH, WIDTH, seed=42 + i) for i, name in enumerate(("ragged", "stacked"))}
    result = qjax.quantize(lambda p, x: jax.lax.scan(layer, x, p)[0], params, policy(qjax.gptaq(mse=False)), data()[:1])
    for row in result.report.rows:
        assert row.method.startswith("gptaq") and not any("one set of statistics" in note or "rounded" in note for note in row.notes), row
