"""Clips and where they come from: synthetic, files, folders, data sets."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .augment import (
        AugmentConfig as AugmentConfig, PasteConfig as PasteConfig, augment_clip as augment_clip,
        paste_object as paste_object,
    )
    from .catalog import (
        describe_data as describe_data, describe_prediction as describe_prediction,
        find_dataset as find_dataset,
    )
    from .chameleon import ChameleonConfig as ChameleonConfig, chameleon_batch as chameleon_batch
    from .clips import (
        Batch as Batch, Clip as Clip, collate as collate, one_hot_objects as one_hot_objects,
    )
    from .damaged import open_damaged as open_damaged
    from .folders import open_folder as open_folder
    from .levels import (
        LEVELS as LEVELS, clip_hash as clip_hash, clip_statistics as clip_statistics,
        level_clips as level_clips,
    )
    from .live import open_camera as open_camera, open_pipe as open_pipe
    from .prediction import PredictionData as PredictionData, prediction_data as prediction_data
    from .stills import (
        StillFolder as StillFolder, StillSampler as StillSampler, still_clip as still_clip,
    )
    from .video import (
        VideoFile as VideoFile, VideoWriter as VideoWriter, open_source as open_source,
    )
    from .vos import DAVIS as DAVIS, VideoFolder as VideoFolder, load_clip as load_clip
    from .walkers import WalkersConfig as WalkersConfig, walkers_batch as walkers_batch
    from .youtube import YouTubeVOS as YouTubeVOS
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "augment": "AugmentConfig PasteConfig augment_clip paste_object",
        "catalog": "describe_data describe_prediction find_dataset",
        "chameleon": "ChameleonConfig chameleon_batch",
        "clips": "Batch Clip collate one_hot_objects",
        "damaged": "open_damaged",
        "folders": "open_folder",
        "levels": "LEVELS clip_hash clip_statistics level_clips",
        "live": "open_camera open_pipe",
        "prediction": "PredictionData prediction_data",
        "stills": "StillFolder StillSampler still_clip",
        "video": "VideoFile VideoWriter open_source",
        "vos": "DAVIS VideoFolder load_clip",
        "walkers": "WalkersConfig walkers_batch",
        "youtube": "YouTubeVOS",
    })
