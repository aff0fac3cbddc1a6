"""Encoders and decoders that the models are made of."""
from typing import TYPE_CHECKING

from stremn import _doors

if TYPE_CHECKING:
    from .aspp import ASPP as ASPP
    from .blocks import FeatureInfo as FeatureInfo
    from .decoders import MaskDecoder as MaskDecoder
    from .efficientnet import LiteEncoder as LiteEncoder, LiteMemoryEncoder as LiteMemoryEncoder
    from .encoders import TinyEncoder as TinyEncoder
    from .resnet import ResNetEncoder as ResNetEncoder
else:
    __getattr__, __dir__, __all__ = _doors(__name__, {
        "aspp": "ASPP",
        "blocks": "FeatureInfo",
        "decoders": "MaskDecoder",
        "efficientnet": "LiteEncoder LiteMemoryEncoder",
        "encoders": "TinyEncoder",
        "resnet": "ResNetEncoder",
    })
