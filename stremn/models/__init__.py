"""Networks around the memory, their baselines, and weights in files."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .hub import (
        available as available, load as load, push_to_hub as push_to_hub,
        save_weights as save_weights,
    )
    from .prediction import PredictionConfig as PredictionConfig, PredictionModel as PredictionModel
    from .prediction_baselines import BASELINES as BASELINES, WEIGHTLESS as WEIGHTLESS
    from .presets import (
        paper_prediction as paper_prediction, paper_vos as paper_vos, small_vos as small_vos,
        timm_vos as timm_vos,
    )
    from .recall import RecallConfig as RecallConfig, RecallModel as RecallModel
    from .vos import EncodedFrame as EncodedFrame, VOSConfig as VOSConfig, VOSModel as VOSModel
    from .vos_baselines import (
        BASELINE_MEMORIES as BASELINE_MEMORIES, with_baseline_memory as with_baseline_memory,
    )
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "hub": "available load push_to_hub save_weights",
        "prediction": "PredictionConfig PredictionModel",
        "prediction_baselines": "BASELINES WEIGHTLESS",
        "presets": "paper_prediction paper_vos small_vos timm_vos",
        "recall": "RecallConfig RecallModel",
        "vos": "EncodedFrame VOSConfig VOSModel",
        "vos_baselines": "BASELINE_MEMORIES with_baseline_memory",
    })
