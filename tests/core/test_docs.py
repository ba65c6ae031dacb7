"""Every example in the docstrings of the room runs, without a silent promotion."""

import doctest
import importlib
import pkgutil

import pytest

import qjax.core


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(qjax.core.__path__)])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"qjax.core.{name}"))
    assert result.attempted > 0 and result.failed == 0
