"""The tables beside committed counts are those of the counts, and the counts those of a compiler that the extra `aot` installs."""

import importlib.util
import json
import os
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "kernels"
FILES = sorted(FOLDER.glob("*_static/*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name} {file.stem}")
def test_the_table_shows_the_rows(file, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # scripts set what compilers read
    monkeypatch.syspath_prepend(str(FOLDER))  # and import from beside them
    spec = importlib.util.spec_from_file_location(file.parent.name, FOLDER / f"{file.parent.name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert file.with_suffix(".md").read_text() == script.table(json.loads(file.read_text())) + "\n"


def test_there_are_counts_for_the_pinned_compilers():
    """Else the gate would have nothing to compare with, and fail late."""
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["aot"]
    versions = [line.split("==")[1].split(";")[0].strip() for line in pinned if line.startswith(("libtpu==", "jax-cuda13-plugin=="))]
    assert len(versions) == 3
    for version in versions:
        assert any(file.stem == version for file in FILES), version
