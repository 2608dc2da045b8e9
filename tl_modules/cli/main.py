"""The `tl` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from tl_modules.cli.command_line import TransferCLI
from tl_modules.cli.messages import cause, one_line
from tl_modules.cli.process import check_utf8, importable, quiet, stop


def main(args: Sequence[str] | None = None) -> None:
    """Runs `tl`: exits with 0, with 2 after a mistake of the user, with 1 after an internal error.

    Args:
        args: The arguments after `tl`; None takes them from the process.
    """
    importable(False)
    quiet()
    words = sys.argv[1:] if args is None else args
    try:
        check_utf8(words)
        if words and words[0] == "compare":  # it has no model and data, but starts runs
            from tl_modules.cli.compare import compare

            compare(words[1:], main)
        elif words and words[0] == "rank":  # it has data, and many backbones instead of a model
            from tl_modules.cli.rank import rank

            rank(words[1:])
        else:
            TransferCLI(words)
    except Exception as error:
        ours = cause(error)
        if ours is None:
            raise
        stop(one_line(ours))
    finally:  # a process group that lives until the interpreter ends can abort there and change the exit code
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
