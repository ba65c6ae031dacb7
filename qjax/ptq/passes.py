"""One pass of the calibration data through a program, with observers at its sites: what every method that looks at data shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.calibration import AllFinite, Observer, OperandObservers, Together, init_states, observe_program
from qjax.program import Key, Program
from qjax.ptq.data import not_finite
from qjax.ptq.progress import Phase

Batches = Sequence[tuple[Program, Any]]


def observe_batches(
    observers: Callable[[Program], Mapping[Key, Observer[Any]]], params: Sequence[Any], batches: Batches, phase: Phase
) -> dict[Key, Any]:
    """Runs all batches through and observes sites.

    Args:
      observers: of a program's sites, by key; the programs of all batches have the same sites.
      params: flat parameters, packed ones too.
      batches: (traced program, its inputs) for each calibration batch.
      phase: is told of each batch.

    Returns:
      The states after all the data.

    Raises:
      ValueError: a batch gives a site NaN or infinity, naming both.
    """

    def watch(program: Program, number: int) -> tuple[dict[Key, Any], Callable[..., Any]]:
        del number
        watched: Any = {key: Together((observer, AllFinite())) for key, observer in observers(program).items()}
        return init_states(program, watched), jax.jit(observe_program(program, watched))

    def check(program: Program, states: dict[Key, Any], number: int) -> None:
        finite = jax.device_get({key: state[1] for key, state in states.items()})
        for site in program.sites:
            if site.key in finite and np.isnan(finite[site.key]).any():
                raise not_finite(site, number)

    return {key: state[0] for key, state in _through(watch, check, params, batches, phase).items()}


def observe_products(
    observers: Mapping[str, OperandObservers], refuse: Callable[[Program, int], None], params: Sequence[Any], batches: Batches, phase: Phase
) -> dict[str, tuple[Any, Any]]:
    """Runs all batches through and observes products of two activations.

    Args:
      observers: by the product's name.
      refuse: called with each program and the number of its first batch; raises where a product is not in it, or cannot be observed.
      params: flat parameters, packed ones too.
      batches: (traced program, its inputs) for each calibration batch.
      phase: is told of each batch.

    Returns:
      The states of both operands after all the data, None of one without an observer.

    Raises:
      ValueError: a batch gives an operand NaN or infinity, naming both.
    """
    watched = {
        name: OperandObservers(*(o and Together((o, AllFinite())) for o in both.pair), rotation=both.rotation)
        for name, both in observers.items()
    }

    def watch(program: Program, number: int) -> tuple[dict[str, Any], Callable[..., Any]]:
        refuse(program, number)
        keys = {p.name: p.key for p in program.products if p.name in watched}
        start = {p.name: watched[p.name].init(p) for p in program.products if p.name in watched}
        run = observe_program(program, {}, {keys[name]: observer for name, observer in watched.items()})

        def by_name(states: dict[str, Any], arguments: list[Any]) -> dict[str, Any]:
            new = run({keys[name]: state for name, state in states.items()}, arguments)
            return {name: new[key] for name, key in keys.items()}

        return start, jax.jit(by_name)

    def check(program: Program, states: dict[str, Any], number: int) -> None:
        del program
        for name, pair in states.items():
            for side, state in zip(("left", "right"), pair, strict=True):
                if state is not None and np.isnan(np.asarray(state[1])).any():
                    what = f"the {side} operand of {name!r}"
                    raise ValueError(f"`calibration` batch {number} gives {what} NaN or infinity; look at that batch")

    found = _through(watch, check, params, batches, phase)
    return {name: (left and left[0], right and right[0]) for name, (left, right) in found.items()}


def _through(watch: Callable[..., Any], check: Callable[..., None], params: Sequence[Any], batches: Batches, phase: Phase) -> Any:
    """Carries the states through the batches; a program is prepared once for all that have it."""
    states, runs = None, {}
    for number, (program, inputs) in enumerate(batches):
        if id(program) not in runs:
            runs[id(program)] = watch(program, number)
        start, run = runs[id(program)]
        states = run(start if states is None else states, [*params, *inputs])
        check(program, states, number)
        phase.step(f"batch {number}")
    return states
