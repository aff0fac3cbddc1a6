"""One training loop for every task, and runs that resume."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .checkpoint import RunFiles as RunFiles, read_log as read_log
    from .loop import FitConfig as FitConfig, Recipe as Recipe, Task as Task, fit as fit
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "checkpoint": "RunFiles read_log",
        "loop": "FitConfig Recipe Task fit",
    })
