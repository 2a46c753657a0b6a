"""One rank of a test: runs a function of a test module, writes down its result. worker.py MODULE:NAME FOLDER JSON"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    faulthandler.enable()
    where, folder, arguments = sys.argv[1:4]
    module, _, name = where.partition(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    rank = os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    # Two processes may have been given one rank.
    (Path(folder) / f"report-{rank}-{os.getpid()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
