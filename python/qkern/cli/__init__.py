"""The command line: one file a command, each of which parses, calls the library and prints.

A command is a function named ``command`` in ``qkern/cli/<name>.py`` (dashes become underscores) and a
line in `COMMANDS`. Heavy packages are imported inside the function, so that ``--help`` stays quick.
Results go to stdout; progress, logs and errors to stderr. Exit codes: 0, 1 (failed), 2 (usage), 130 (Ctrl-C),
143 (SIGTERM).
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperCommand

from qkern import __version__, _env, _progress
from qkern.errors import QkernError, reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "app", "main"]

COMMANDS: Final = (
    "info",
    "demo",
    "plan",
    "quantize",
    "sensitivity",
    "search",
    "imatrix",
    "export-gguf",
    "convert",
    "verify",
    "perplexity",
    "compare",
    "generate",
    "bench",
)

_INTERRUPTED: Final = 130
_TERMINATED: Final = 143

app = typer.Typer(
    name="qkern",
    help="Quantize LLM weights, run them with low-bit kernels, export them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _StderrHandler(logging.Handler):
    """Writes log records to the console of the progress bars, so that the two do not tear each other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            _progress.console().print(
                f"{level}{self.format(record)}", markup=False, highlight=False, soft_wrap=True
            )
        except Exception:  # a log line must never end a run
            self.handleError(record)


def _set_up_logging(level: int) -> None:
    logger = logging.getLogger("qkern")
    logger.setLevel(level)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qkern {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details and tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings only, no progress.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if quiet:
        _env.disable_progress()
    _set_up_logging(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


# What is no choice of an option but done elsewhere, by command.
_ELSEWHERE: Final = {
    ("convert", "gguf"): "qkern export-gguf writes GGUF",
    ("convert", "bitsandbytes"): "qkern quantize --method rtn --scheme nf4g64 makes it of the 16-bit model",
    ("quantize", "gguf"): "qkern export-gguf writes GGUF, by --method gptq or awq too",
    ("quantize", "nf4"): "it is a scheme: --method rtn --scheme nf4g64",
    ("quantize", "fp4"): "it is a scheme: --method rtn --scheme fp4g64",
    ("quantize", "llm_int8"): "in Python qkern.load(model, int8=True) is LLM.int8(), which qkern.save writes",
}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # pydantic's, through newer typers
            for (command, word), hint in _ELSEWHERE.items():
                if command == ctx.info_name and f"'{word}' is not one of" in error.message:
                    error.message += f" ({hint})"
            raise


for _name in COMMANDS:
    app.command(_name, cls=_Command)(importlib.import_module(f"qkern.cli.{_name.replace('-', '_')}").command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: ``sys.argv[1:]``.

    Raises
    ------
    SystemExit
        Always; code 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    in_main = threading.current_thread() is threading.main_thread()
    # As Ctrl-C: what is half-written is removed on the way out.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED)) if in_main else None
    try:
        app(args=None if arguments is None else list(arguments), prog_name="qkern")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            sys.stderr.write("qkern: interrupted\n")
        raise
    except (QkernError, OSError) as error:
        logging.getLogger("qkern").debug("traceback of the error below", exc_info=True)
        sys.stderr.write(f"qkern: error: {_one_line(error)}\n")
        sys.exit(1)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _one_line(error: QkernError | OSError) -> str:
    names = (getattr(error, "filename", None), getattr(error, "filename2", None))
    return ": ".join([*(os.fsdecode(name) for name in names if name is not None), reason_of(error)])
