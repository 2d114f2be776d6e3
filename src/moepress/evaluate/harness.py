# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-eval command line, able to load a compressed directory.

    python -m moepress.evaluate.harness --model hf --model_args pretrained=DIR --tasks piqa

lm-eval loads models through transformers, which must know the format of a compressed checkpoint
before it opens one; `import moepress` is all that takes. Every argument is lm-eval's own. Refused:
running without lm-eval installed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from moepress.errors import EvaluationError, MoepressError


def main(argv: Sequence[str] | None = None) -> None:
    """Run lm-eval's command line with `argv`, by default this process's arguments.

    lm-eval ends the process itself (SystemExit) for `--help` and for arguments it does not know.

    Raises EvaluationError where lm-eval is not installed.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed; use: pip install 'moepress[eval]'")
    # Both are imported here: they are heavy, and the second is an optional dependency.
    from lm_eval.__main__ import cli_evaluate

    import moepress.hf  # noqa: F401  (registers the compressed format with transformers)

    before = sys.argv
    # cli_evaluate takes no arguments: it reads sys.argv, and inserts into it.
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    try:
        main()
    except MoepressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
