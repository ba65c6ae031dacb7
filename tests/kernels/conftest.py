"""What is compiled ahead of time is compiled in a process of its own: compilers read their variables when jax starts, and print."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory):
    """The rows that a script of experiments/kernels writes."""

    def run(script, *arguments):
        file = tmp_path_factory.mktemp("static") / "rows.json"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": paths}
        command = [sys.executable, ROOT / "experiments" / "kernels" / script, *arguments, "--write", file]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())

    return run
