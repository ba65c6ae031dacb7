"""`qjax tune`: see `bench`."""

from qjax.cli.bench import tune as command

__all__ = ["command"]
