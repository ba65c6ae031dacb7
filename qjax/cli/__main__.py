"""`python -m qjax.cli`, the same as `qjax`."""

from qjax.cli.main import main

main(prog_name="qjax")
