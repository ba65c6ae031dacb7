"""`qjax`: the group of commands, and how an error leaves it: one line on stderr, without a traceback."""

import importlib
import importlib.metadata
import sys
from typing import Any

import click

from qjax.cli.shared import in_options

# Where each command is. A command's module imports jax only when it runs, so that help is instant.
_COMMANDS = {
    "demo": "qjax.cli.demo",
    "quantize": "qjax.cli.quantize",
    "calibrate": "qjax.cli.calibrate",
    "eval": "qjax.cli.evaluate",
    "inspect": "qjax.cli.inspect",
    "generate": "qjax.cli.generate",
    "doctor": "qjax.cli.doctor",
    "bench": "qjax.cli.bench",
    "tune": "qjax.cli.tune",
}
_TRACEBACK = "qjax.traceback"


class Commands(click.Group):
    """A group whose commands are imported when they are asked for, and whose errors are one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(_COMMANDS[cmd_name]).command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError) as error:  # what the library documents; anything else is a bug: a traceback
            if ctx.meta.get(_TRACEBACK):
                raise
            raise click.ClickException(_describe(error)) from error

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **kwargs))
        except click.Abort as error:
            click.echo(f"qjax: interrupted{f': {error}' if str(error) else ''}", err=True)
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            click.echo(f"qjax: error: {_one_line(error.format_message())}{_hint(error)}", err=True)
            sys.exit(error.exit_code)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return in_options(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see: {ctx.command_path} --help)" if ctx is not None else ""


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"qjax {importlib.metadata.version('qjax')}")
        ctx.exit()


def _keep_traceback(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_TRACEBACK] = value


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.option("--traceback", is_flag=True, expose_value=False, callback=_keep_traceback, help="Show where an error arose.")
def main() -> None:
    """Quantizes language models with JAX, and shows what it cost.

    A MODEL is the folder of a Hugging Face Llama checkpoint (config.json, safetensors, tokenizer.json), a packed checkpoint
    made by `qjax quantize`, or the word books-llama-4m for the small trained model inside the package.

    Progress and errors go to stderr; with --json a command writes one JSON document to stdout and nothing else.
    """
