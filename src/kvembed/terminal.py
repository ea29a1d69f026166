"""The command in its terminal: Ctrl-C and SIGTERM, an output that closes, one line for whatever goes wrong."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import typer

from .errors import KvembedError
from .files import why
from .process import is_importing

__all__ = ["in_a_terminal", "one_line_errors", "stop"]

_NAMES: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_asked_to_stop: list[int] = []  # the signals that came


def stop(number: int, _frame: object) -> None:
    """What SIGINT and SIGTERM do; a scheduler's or a container host's SIGTERM is no less in good order than Ctrl-C."""
    _asked_to_stop.append(number)
    if is_importing():  # nothing has begun, and an error in the middle of torch's own code ends in a crash
        os.write(2, f"kvembed: {_NAMES[number]}\n".encode())
        os._exit(128 + number)
    raise KeyboardInterrupt


def _interrupt_again(event: Any) -> None:
    """Python drops a signal that lands in a finaliser, as it may during seconds of imports: send it once more."""
    if issubclass(event.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main, _asked_to_stop[-1:]).start()
    else:
        sys.__unraisablehook__(event)


@contextlib.contextmanager
def one_line_errors(kept: str = "") -> Iterator[None]:
    """Whatever goes wrong, one line on standard error and a non-zero exit; KVEMBED_DEBUG=1 shows where.

    `kept` is told after Ctrl-C or SIGTERM: what is left of the work, and how to go on.
    """
    logger = logging.getLogger("kvembed")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kvembed: %(message)s"))
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.level, logger.propagate = [handler], logging.INFO, False
    try:
        yield
    except (BrokenPipeError, typer.Exit):
        raise
    except (Exception, KeyboardInterrupt) as error:
        # Imports turn an interrupt into errors of their own: once a signal has come, whatever ends the work is its.
        if _asked_to_stop or isinstance(error, KeyboardInterrupt):
            number = signal.SIGTERM if signal.SIGTERM in _asked_to_stop else signal.SIGINT
            logger.error(f"{_NAMES[number]}; {kept}" if kept else _NAMES[number])
            # If the interrupt fell into an `exec` of a string (imports make dataclasses so), Python would end by the
            # signal whatever the exit code, unless another `exec` has run since.
            exec("")  # noqa: S102
            raise typer.Exit(128 + number) from None
        if os.environ.get("KVEMBED_DEBUG"):
            raise
        text = " ".join(str(error).split())
        known = isinstance(error, KvembedError)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            known, text = True, f"{error.filename or 'standard output'}: no space left on the device"
        logger.error(text if known else f"unexpected {type(error).__name__}: {text} (KVEMBED_DEBUG=1 shows more)")
        raise typer.Exit(1) from None
    finally:
        logger.handlers, logger.level, logger.propagate = before


@contextlib.contextmanager
def in_a_terminal() -> Iterator[None]:
    """A command from beginning to end: what signals do, and an output that may be closed, full or of few letters."""
    sys.unraisablehook = _interrupt_again
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what it runs in the background
            signal.signal(number, stop)
    try:
        os.getcwd()
    except OSError:  # libraries look at it, whatever paths a command is given
        sys.exit("kvembed: the working directory is gone")
    if os.environ.get("COLUMNS") == "0":  # not known, that is; tables would have no room at all
        del os.environ["COLUMNS"]
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a letter is no reason to stop
    try:
        yield
    except OSError as error:
        if os.environ.get("KVEMBED_DEBUG") and not isinstance(error, BrokenPipeError):
            raise
        _give_up_output(error)
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            _give_up_output(error)


def _give_up_output(error: OSError) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it would be flushed again at exit
    if not isinstance(error, BrokenPipeError):  # of a reader such as `head`, which wants no more
        sys.exit(f"kvembed: standard output: {why(error)}")
