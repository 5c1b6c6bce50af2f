"""Imports parts of a package without the rest of it."""

from __future__ import annotations

import contextlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def without_package_init(name: str) -> Iterator[None]:
    """Let submodules of a package be imported inside without running its `__init__`.

    pyroute2's imports its network database, sqlite3 and unittest, kubernetes' all its 700 models: 7 and 20 MiB of an
    agent's memory on every node, for nothing. Afterwards the package is as if it had not been imported: whoever imports
    it then gets all of it.
    """
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        yield
        return
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]
