"""Registers the backend with torch, now or when torch is imported; who does not use torch does not load it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "torch.distributed"


def register_with_torch() -> None:
    """Registers "smddp" if torch.distributed is loaded, and else as soon as it is."""
    loaded = sys.modules.get(_TARGET)
    if loaded is not None and hasattr(loaded, "is_available"):
        _register(loaded)
    elif not any(isinstance(finder, _AfterTorch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())


def _register(distributed: ModuleType) -> None:
    # A torch built without distributed has the module and nothing in it.
    if not distributed.is_available():
        return
    from ._compat import refused

    # The rest imports names that a torch we refuse may lack.
    if not refused("smddp"):
        from .backend import register

        register()


class _AfterTorch(MetaPathFinder):
    """Lets the normal finders find torch.distributed, and runs our registration once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """A loader that does what `inner` does, then registers. It steps back at once, so that nobody meets it later."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register(module)
