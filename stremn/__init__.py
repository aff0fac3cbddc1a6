"""Slot memory for video: an open implementation of the Space Time Recurrent Memory Network (STReMN)."""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _doors(package: str, homes: dict[str, str]):
    """Lazy re-exports: a name is imported from its module when it is first asked for, so that importing stays instant.

    Args:
        package: dotted name of the package that re-exports.
        homes: module below it -> names, separated by spaces.

    Returns:
        `__getattr__`, `__dir__` and `__all__` of the package.
    """
    module = {name: home for home, names in homes.items() for name in names.split()}

    def __getattr__(name: str):
        if name not in module:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module[name]}"), name)

    def __dir__():
        return sorted(module)

    return __getattr__, __dir__, sorted(module)


if TYPE_CHECKING:
    from .core import StremnError as StremnError
    from .memory.bank import MemoryBank as MemoryBank
    from .memory.rules import RULES as RULES
    from .models.hub import available as available, load as load, save_weights as save_weights
    from .models.prediction import PredictionModel as PredictionModel
    from .models.vos import VOSModel as VOSModel
    from .prediction.stream import VideoPredictor as VideoPredictor
    from .results import Record as Record
    from .vos.evaluate import evaluate_davis as evaluate_davis
    from .vos.stream import VideoSegmenter as VideoSegmenter
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "core": "StremnError",
        "memory.bank": "MemoryBank",
        "memory.rules": "RULES",
        "models.hub": "available load save_weights",
        "models.prediction": "PredictionModel",
        "models.vos": "VOSModel",
        "prediction.stream": "VideoPredictor",
        "results": "Record",
        "vos.evaluate": "evaluate_davis",
        "vos.stream": "VideoSegmenter",
    })
