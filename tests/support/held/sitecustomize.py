"""On PYTHONPATH: trainings are held as held_cell.py does, whoever starts them; REPLICATION_HELD names the folder."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

HELD = "replication.training.stopping"


class HoldsSteps:
    """Finds the module that asks whether to stop, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != HELD:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_hold(module: ModuleType) -> None:
            load(module)
            sys.path.append(str(Path(__file__).parents[1]))
            from held_cell import hold_steps

            sys.path.pop()
            hold_steps(Path(os.environ["REPLICATION_HELD"]))

        spec.loader.exec_module = load_and_hold  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, HoldsSteps())  # type: ignore[arg-type]
