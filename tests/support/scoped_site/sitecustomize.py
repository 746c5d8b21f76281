"""In a process that a scoped test started: its brokers are scoped, too, from when it imports them on."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


class _Hook:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "dramatiq_durable.broker":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            sys.modules[name] = module
            from tests.support import scoped

            scoped.install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Hook())  # type: ignore[arg-type]
