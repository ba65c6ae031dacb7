"""Progress of every phase: what is done, of how much, and a remaining time that follows the work."""

import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from qjax.ptq.progress import Monitor
from tests.program.cases import normal


def fn(p, x):
    h = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * p["norm"]
    return jnp.tanh(h @ p["a"]) @ p["b"]


PARAMS = {"norm": 1 + jnp.abs(normal(16)), "a": normal(16, 8), "b": normal(8, 4, seed=1)}


def test_every_phase_is_told_in_order():
    events = []
    policy = qjax.Policy(
        [
            qjax.Rule("a", weight=qjax.int8(), method=qjax.smoothquant(), activation=qjax.static(qjax.int8())),
            qjax.Rule("b", weight=qjax.int4(), method=qjax.gptq(mse=False)),
        ]
    )
    qjax.quantize(fn, PARAMS, policy, [normal(4, 16, seed=i) for i in range(2)], progress=events.append)
    assert [(e.phase, e.done, e.total, e.path) for e in events] == [
        ("rescale", 0, 3, ""), ("rescale", 1, 3, "batch 0"), ("rescale", 2, 3, "batch 1"), ("rescale", 3, 3, "a"),
        ("round", 0, 1, ""), ("round", 1, 1, "a"),
        ("calibrate", 0, 1, ""), ("calibrate", 1, 1, "b"),
        ("ranges", 0, 2, ""), ("ranges", 1, 2, "batch 0"), ("ranges", 2, 2, "batch 1"),
    ]  # fmt: skip
    assert all((e.remaining is None) == (e.done == 0) for e in events)
    assert all(e.remaining == pytest.approx(0, abs=1e-9) for e in events if e.done == e.total)
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)


def test_the_remaining_time_follows_the_work_and_ignores_what_was_found():
    now, events = [0.0], []
    monitor = Monitor(events.append, clock=lambda: now[0])
    phase = monitor.phase("calibrate", [5.0, 1.0, 3.0, 6.0])
    for seconds, path, found in ((1.0, "found", True), (2.0, "a", False), (6.0, "b", False), (12.0, "c", False)):
        now[0] += seconds
        phase.step(path, found)
    # Work that was done in this run: 1, then 4, then 10 of 10, in 2, 8 and 20 seconds.
    assert [e.remaining for e in events] == [None, None, 18.0, 12.0, 0.0]
    assert [e.seconds for e in events] == [0.0, 1.0, 3.0, 9.0, 21.0]
    assert [e.done for e in events] == [0, 1, 2, 3, 4]
