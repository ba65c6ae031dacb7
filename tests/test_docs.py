"""The examples in docstrings and the README run, and the README prints what it says."""

import contextlib
import doctest
import importlib
import io
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


@pytest.mark.parametrize("title", ["Training through rounding", "Adapters", "The optimizer's memory"])
def test_figures_on_training_are_those_of_the_experiments(title):
    """Every number with a point or a percent sign stands in a README that the section links to."""
    text = re.sub(r"```.*?```|`[^`\n]+`", "", sections("docs/choosing.md")[title], flags=re.DOTALL)
    linked = set(re.findall(r"\]\((\.\./experiments/[a-z_]+/README\.md)\)", text))
    words = " ".join((ROOT / "docs" / path).read_text() for path in linked)
    figures = [number.lstrip("+") for number in re.findall(r"(?<![\w.])[+-]?\d*\.\d+(?: %)?|(?<![\w.])-?\d+ %", text)]
    assert linked and len(figures) > 5 and not [f for f in figures if not re.search(rf"(?<![\d.]){re.escape(f)}", words)]


def sections(page: str) -> dict[str, str]:
    """What stands under each `## ` of a page, by its title; "" is what stands before the first."""
    first, *rest = re.split(r"(?m)^## ", (ROOT / page).read_text())
    return {"": first} | {title: text for title, _, text in (part.partition("\n") for part in rest)}


def differs(printed: str, page: str) -> bool:
    """Whether an output is not the page's: words and whole numbers are the same, decimals near (machines sum in different orders)."""
    decimal = r"-?\d+\.\d+"
    if re.sub(decimal, "#", printed) != re.sub(decimal, "#", page):
        return True
    pairs = zip(*(map(float, re.findall(decimal, text)) for text in (printed, page)), strict=True)
    return any(a != pytest.approx(b, rel=0.05, abs=0.005) for a, b in pairs)


def run_printed(text: str, scope: dict) -> int:
    """Runs blocks in order and holds what each prints to the output that stands under it; returns how many outputs there were."""
    found = re.findall(r"```python\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)
    for code, page in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "training.md", "exec"), scope)
        assert not differs(printed.getvalue(), page), f"printed\n{printed.getvalue()}and the page says\n{page}"
    return sum(bool(page) for _, page in found)


def test_a_page_that_prints_something_else_is_found():
    assert not differs("2.12 nats, 3 of 4 steps\n", "2.09 nats, 3 of 4 steps\n")
    assert differs("2.12 nats, 3 steps\n", "2.12 nats, 4 steps\n") and differs("2.12 nats\n", "1.90 nats\n")
    assert differs("True\n", "False\n") and differs("2.1 2.1\n", "2.1\n") and differs("more\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("title", list(sections("docs/training.md"))[1:])
def test_the_page_on_training_prints_what_it_says(title, tmp_path, monkeypatch):
    """Every section runs after the first block alone."""
    monkeypatch.chdir(tmp_path)
    page, scope = sections("docs/training.md"), {}
    assert run_printed(page[""], scope) == 1
    assert run_printed(page[title], scope) >= 1
    assert scope.get("agree", 1.0) > 0.99


@pytest.mark.slow
def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("python")
    assert len(code) >= 3
    scope: dict = {}
    for block in code:
        exec(compile(block, "README.md", "exec"), scope)
    assert scope["same"] is True
