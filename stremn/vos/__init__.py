"""Video object segmentation: streaming, files, training, evaluation."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .evaluate import (
        evaluate_davis as evaluate_davis, evaluate_folders as evaluate_folders,
        evaluate_youtube as evaluate_youtube,
    )
    from .exports import write_cutout as write_cutout, write_prob as write_prob
    from .files import segment_dataset as segment_dataset, segment_video as segment_video
    from .multiscale import TestTimeConfig as TestTimeConfig
    from .state import MemoryReport as MemoryReport
    from .stream import VideoSegmenter as VideoSegmenter
    from .train import (
        ChameleonTask as ChameleonTask, ChameleonTraining as ChameleonTraining,
        VideoTask as VideoTask, VideoTraining as VideoTraining,
    )
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "evaluate": "evaluate_davis evaluate_folders evaluate_youtube",
        "exports": "write_cutout write_prob",
        "files": "segment_dataset segment_video",
        "multiscale": "TestTimeConfig",
        "state": "MemoryReport",
        "stream": "VideoSegmenter",
        "train": "ChameleonTask ChameleonTraining VideoTask VideoTraining",
    })
