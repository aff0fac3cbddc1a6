"""Rules of forgetting in other people's models."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .sam2 import held_bytes as held_bytes, with_rule as with_rule
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {"sam2": "held_bytes with_rule"})
