"""What is to be done as soon as a module is imported, whoever imports it and whenever."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(
    name: str, action: Callable[[], object], *, within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Call ``action`` once the module ``name`` is imported: now where it is already, else right behind its own code.

    Args:
        name: full name of a module, which need not exist.
        action: what it raises, the import of the module raises.
        within: makes a context that the module's own code runs in.
    """
    if name in sys.modules:
        importlib.import_module(name)  # another thread may be at it: this waits
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action, within))


class _Finder(importlib.abc.MetaPathFinder):
    """Asks the other finders for one module, and puts a loader around theirs."""

    def __init__(
        self, name: str, action: Callable[[], object], within: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.name, self.action, self.within = name, action, within

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        # Those behind it: one before it may wait for the same module, and has asked this one.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads as ``loader`` does, then acts; the module shows no trace of it."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        with self.finder.within():
            self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.action()

    def __getattr__(self, name: str) -> Any:
        """Whoever only looks at a spec asks its loader for source, code or resources."""
        return getattr(self.loader, name)
