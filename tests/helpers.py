"Shared by several test modules: pictures, folders and small configs."
import torch
import torch.nn.functional as F

from stremn.core import make_generator
from stremn.data.augment import AugmentConfig

NO_COLOUR_CHANGE = AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0, grey=0,
                                 frame_brightness=0, frame_contrast=0, frame_saturation=0)


def boxes_picture(seed=0, size=(24, 36)):
    "Smooth random colours (3,H,W), and labels (H,W) with two boxes."
    low = torch.rand(1, 3, 5, 6, generator=make_generator(seed))
    h, w = size
    labels = torch.zeros(size, dtype=torch.long)
    labels[h // 4:h // 2, w // 6:w // 2] = 1
    labels[h // 2:h * 3 // 4, w // 2:w * 5 // 6] = 2
    return F.interpolate(low, size, mode="bilinear")[0], labels
