"""Time of a compiled program, measured warm, with its compilation apart."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds of one program.

    Attributes:
      seconds: of every counted call, in order.
      trace_seconds: tracing and lowering.
      compile_seconds: XLA's compilation; short if XLA had compiled the same program before.
    """

    seconds: tuple[float, ...]
    trace_seconds: float
    compile_seconds: float

    @property
    def median_seconds(self) -> float:
        """Median of the calls."""
        return statistics.median(self.seconds)

    @property
    def spread_seconds(self) -> float:
        """Slowest less fastest call: differences of medians below this mean little."""
        return max(self.seconds) - min(self.seconds)

    def tokens_per_second(self, tokens: int) -> float:
        """Rate at the median, for a call that handles so many tokens."""
        return tokens / self.median_seconds


def measure_speed(fn: Callable[..., Any], *args: Any, repeats: int = 10, warmup: int = 2) -> Timing:
    """Compiles a function for its arguments and times the compiled program until its results are ready.

    Args:
      fn: a function of arrays, jitted or not. It must not donate its arguments, as they are passed again.
      *args: its arguments.
      repeats: calls that count.
      warmup: calls before them.

    Returns:
      The timing.

    Raises:
      ValueError: `repeats` below 1 or `warmup` below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> timing = measure_speed(lambda x: x @ x, jnp.ones((8, 8)), repeats=3)
      >>> len(timing.seconds), timing.median_seconds > 0
      (3, True)
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"`repeats` must be at least 1 and `warmup` at least 0, not {repeats} and {warmup}")
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    for _ in range(warmup):
        jax.block_until_ready(compiled(*args))
    return Timing(tuple(_timed(compiled, args) for _ in range(repeats)), traced - start, done - traced)


def _timed(compiled: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start
