"""Slot memory for video: an open implementation of the Space Time Recurrent Memory Network (STReMN)."""

__version__ = "0.1.0"
__all__ = ["MemoryBank", "StremnError", "VideoSegmenter", "available", "load"]

_HOME = {"MemoryBank": "memory.bank", "StremnError": "core", "VideoSegmenter": "infer",
         "available": "models.hub", "load": "models.hub"}


def __getattr__(name):
    "The everyday names, imported when first asked for: `import stremn` itself stays instant."
    if name not in _HOME:
        raise AttributeError(f"module 'stremn' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"stremn.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
