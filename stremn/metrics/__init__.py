"""Metrics of masks and of frames; arrays in, numbers out."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .frames import (
        CONVENTIONS as CONVENTIONS, psnr as psnr, score_frames as score_frames, ssim as ssim,
    )
    from .vos import (
        Report as Report, boundary as boundary, contour_accuracy as contour_accuracy,
        jaccard as jaccard, score_video as score_video,
    )
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "frames": "CONVENTIONS psnr score_frames ssim",
        "vos": "Report boundary contour_accuracy jaccard score_video",
    })
