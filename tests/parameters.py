"""Parameters of tests that have many."""

from collections.abc import Iterable

import pytest


def every_other(cases: Iterable) -> list:
    """The first, third, ... of the cases in the ordinary test line; the rest is marked slow."""
    return [case if i % 2 == 0 else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
            for i, case in enumerate(cases)]  # fmt: skip
