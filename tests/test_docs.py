"""The examples in docstrings and the README run, and the README prints what it says."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import qjax

ROOT = pathlib.Path(qjax.__file__).parent.parent
# Those of qjax.core run in tests/core/test_docs.py.
MODULES = [m.name for m in pkgutil.walk_packages(qjax.__path__, "qjax.") if not m.name.endswith("__main__") and ".core." not in m.name]
PUBLIC = [name for name in vars(qjax) if not name.startswith("_") and callable(getattr(qjax, name))]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_with_an_example(name):
    text = getattr(qjax, name).__doc__ or ""
    assert text.strip(), name
    if not isinstance(getattr(qjax, name), type):
        assert ">>>" in text, f"{name} has no example"


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_what_the_page_on_choosing_names_is_there():
    scope: dict = {}
    for block in blocks("python", "docs/choosing.md"):
        exec(compile(block, "choosing.md", "exec"), scope)
    assert isinstance(scope["policy"], qjax.Policy) and len(scope["cache"]) == 2
    text = (ROOT / "docs/choosing.md").read_text()
    calls = {name for line in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"([a-z_0-9]+)\(", line)}
    assert "autoround" in calls and not {name for name in calls if not hasattr(qjax, name)}


@pytest.mark.slow
def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 3
    scope: dict = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["same"] is True
