# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call, print. One file per family of commands; `main` is the entry point."""

from __future__ import annotations

import sys

from moepress.cli import (  # noqa: F401  (importing registers their commands)
    bench,
    calibrate,
    compress,
    generate,
    plan,
    run,
    train_pruning,
)
from moepress.cli.app import app
from moepress.errors import MoepressError


def main() -> None:
    """`moepress ...`; what a user's input did wrong is one line on stderr and status 2."""
    try:
        app()
    except MoepressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer's word for KeyboardInterrupt
            known = "`moepress compress`, `calibrate` or `train-pruning`"
            print(f"interrupted; --resume continues an unfinished {known}", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; there is nobody left to tell
        sys.exit(141)
