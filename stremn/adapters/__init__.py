"""Rules of forgetting in other people's models, and masks for other people's tools."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .detections import (
        areas_and_boxes as areas_and_boxes, coco_instances as coco_instances, from_rle as from_rle,
        to_detections as to_detections, to_rle as to_rle,
    )
    from .sam2 import held_bytes as held_bytes, with_rule as with_rule
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "detections": "areas_and_boxes coco_instances from_rle to_detections to_rle",
        "sam2": "held_bytes with_rule",
    })
