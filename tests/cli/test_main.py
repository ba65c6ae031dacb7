"""The group of commands: help without jax, errors as one line, JSON that is JSON."""

import ast
import json
import sys
from pathlib import Path

import pytest

import qjax.cli.main
from qjax.cli.shared import emit

from .conftest import error_of, invoke

CLI = Path(qjax.cli.main.__file__).parent
COMMANDS = ["demo", "quantize", "calibrate", "eval", "inspect", "generate", "doctor", "bench", "tune"]


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name}")
    assert "--json" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", ["__init__", "main", "shared", "recipe", "evaluate", "estimates", *COMMANDS[:3], *COMMANDS[4:]])
def test_help_needs_no_jax(name):
    """What help imports may import nothing heavy at its top."""
    for node in ast.parse((CLI / f"{name}.py").read_text()).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.split(".")[0]
            own = module in ("qjax.cli.shared", "qjax.cli.recipe", "qjax.cli.bench", "qjax.cli.estimates")
            assert own or top in sys.stdlib_module_names | {"click", "rich"}, f"{name}.py imports {module}"


def test_version():
    assert invoke("--version").stdout == f"qjax {qjax.__version__}\n"


def test_no_command_shows_help_and_fails():
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr
    assert result.stdout == ""


def test_unknown_command_and_option():
    assert "frobnicate" in error_of("frobnicate", code=2)
    assert "--frobnicate" in error_of("eval", "--frobnicate", code=2)


def test_traceback_is_shown_when_asked_for(tmp_path):
    line = error_of("inspect", tmp_path / "nothing", code=1)
    assert "nothing" in line
    result = invoke("--traceback", "inspect", tmp_path / "nothing")
    assert isinstance(result.exception, FileNotFoundError)


def test_emit_writes_json_for_numbers_that_json_lacks(capsys):
    emit({"perplexity": float("nan"), "rows": [{"kl": float("inf")}, 1.5, "x"]})
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "rows": [{"kl": None}, 1.5, "x"]}
