"""What a rank is to run, as the command line names it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from smddprun.errors import UsageError


def words(options: argparse.Namespace) -> list[str]:
    """The program and its arguments: Python for a module and for a .py file."""
    if options.module:
        return [sys.executable, "-m", options.program, *options.arguments]
    if options.program.endswith(".py"):
        if not Path(options.program).is_file():
            raise UsageError(f"{options.program}: no such file in {Path.cwd()} of {os.uname().nodename}")
        return [sys.executable, options.program, *options.arguments]
    if shutil.which(options.program) is None:
        raise UsageError(
            f"{options.program}: no such program on {os.uname().nodename}; a Python script's name ends in .py", 127
        )
    return [options.program, *options.arguments]
