"""The examples in the docstrings of the kernels run."""

import doctest
import importlib
import pathlib

import pytest
import qjax_kernels
from qjax_kernels import cpu

ROOT = pathlib.Path(qjax_kernels.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if ">>>" in path.read_text())
MODULES = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module == "qjax_kernels.cpu.matmul" and cpu.why_not_loaded():
        pytest.skip(f"no kernels for CPUs here: {cpu.why_not_loaded()}")
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed
