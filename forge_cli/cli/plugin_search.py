"""Keeps pydantic from looking for plugins, which costs a tenth of the start of `forge config`."""

from __future__ import annotations

import os
import sys
from types import ModuleType

_LOADER = "pydantic.plugin._loader"


class _NoPlugins(ModuleType):
    """Stands in for pydantic's plugin loader; whatever else is asked of it comes from the real one."""

    @staticmethod
    def get_plugins(*_: object) -> tuple[()]:
        """Finds no plugins."""
        return ()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        import importlib

        sys.modules.pop(_LOADER, None)
        return getattr(importlib.import_module(_LOADER), name)


def skip_plugin_search() -> None:
    """Makes pydantic find no plugins without importing ``importlib.metadata``.

    Even with plugins switched off, pydantic 2.12 to 2.14 import it to look for them: 8 ms of 120. Should pydantic
    keep its loader elsewhere one day, this has no effect and the command is that much slower.
    """
    if os.environ.get("PYDANTIC_DISABLE_PLUGINS") == "__all__":
        sys.modules.setdefault(_LOADER, _NoPlugins(_LOADER))
