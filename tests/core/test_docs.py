"""Every example in the docstrings of the room runs."""

import doctest
import importlib

import pytest

MODULES = [
    "adapter", "affine", "assemble", "cache", "codebook", "elements", "factories", "floating", "granularity", "hadamard", "layout",
    "learned", "named_specs", "packing", "qtensor", "reductions", "rounding", "scales", "specs", "views",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"qjax.core.{name}"))
    assert result.attempted > 0 and result.failed == 0
