"""Progress of long work: what is done, and how long the rest will take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Progress:
    """One step of a long computation, as `qjax.quantize(progress=...)` is told of it.

    Attributes:
      phase: what is at work: "rescale" (passes over the data for AWQ and SmoothQuant), "round" (parameters without data),
        "calibrate" (parameters on the data, in data-flow order), "ranges" (static activation ranges), "outliers" (columns of `llm_int8`),
        "products" (static ranges of named products).
      done: steps of the phase that are done.
      total: steps of the phase.
      path: what the last step finished, a parameter's path or a batch; "" where a phase begins.
      seconds: since the work began.
      remaining: estimated seconds until the phase ends, `t (W - w) / w` for the work w of W done in the time t; None before
        its first step. What was found on the disk (`resume=`) counts in neither. Compilation is part of t, so early estimates
        of short phases are too long.

    Example:
      >>> Progress("calibrate", 3, 14, "layers_0/mlp/up/kernel", 12.0, 44.0).remaining
      44.0
    """

    phase: str
    done: int
    total: int
    path: str
    seconds: float
    remaining: float | None


Listener = Callable[[Progress], None]


class Monitor:
    """Tells a listener of the phases of one computation."""

    def __init__(self, listener: Listener | None = None, clock: Callable[[], float] = time.perf_counter):
        self.listener, self.clock = listener, clock
        self.started = clock()

    def phase(self, name: str, work: Sequence[float]) -> Phase:
        """Begins a phase whose steps take about as long as `work` says, in any unit."""
        return Phase(self, name, work)


class Phase:
    """A phase at work: call `step` after each of its steps."""

    def __init__(self, monitor: Monitor, name: str, work: Sequence[float]):
        self.monitor, self.name, self.work = monitor, name, work
        self.done, self.worked, self.found = 0, 0.0, 0.0
        self.last, self.elapsed = monitor.clock(), 0.0
        if work:
            self._tell("", None)

    def step(self, path: str, found: bool = False) -> None:
        """One more step is done; `found` where an earlier run had done it."""
        now, work = self.monitor.clock(), self.work[self.done]
        self.done += 1
        if found:
            self.found += work
        else:
            self.worked += work
            self.elapsed += now - self.last
        self.last = now
        left = max(sum(self.work) - self.worked - self.found, 0.0)
        self._tell(path, self.elapsed * left / self.worked if self.worked else None)

    def _tell(self, path: str, remaining: float | None) -> None:
        if self.monitor.listener is not None:
            seconds = self.monitor.clock() - self.monitor.started
            self.monitor.listener(Progress(self.name, self.done, len(self.work), path, seconds, remaining))
