"""Video prediction: streaming, files, training."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .files import (
        PredictOptions as PredictOptions, PredictionOutput as PredictionOutput,
        predict_video as predict_video,
    )
    from .stream import (
        VideoPredictor as VideoPredictor, find_predictor as find_predictor,
        predict_clips as predict_clips,
    )
    from .train import PredictionTask as PredictionTask, PredictionTraining as PredictionTraining
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "files": "PredictOptions PredictionOutput predict_video",
        "stream": "VideoPredictor find_predictor predict_clips",
        "train": "PredictionTask PredictionTraining",
    })
