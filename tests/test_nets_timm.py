"""Encoders of timm: any convolutional model with maps at strides 4 and 8 stands before the memory."""
import sys

import pytest
import torch

from refusals import refused
from stremn.core import make_generator
from stremn.models.hub import load
from stremn.models.presets import small_vos, timm_vos
from stremn.models.vos import VOSModel
from stremn.nets.encoders import TimmEncoder
from stremn.train.loop import FitConfig, fit
from stremn.vos.stream import VideoSegmenter
from stremn.vos.train import ChameleonPhase, ChameleonTask, ChameleonTraining, load_imagenet_encoder, weight_groups
from stremn.vos.train import VideoTraining
from stremn.data.chameleon import ChameleonConfig, chameleon

MODELS = {"resnet18": (64, 128), "convnext_atto": (40, 80), "mobilenetv3_small_050": (8, 16)}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_of_timm_at_strides_4_and_8(timm, name):
    encoder = TimmEncoder(name).eval()
    assert [tuple(i) for i in encoder.feature_info] == [(MODELS[name][0], 4), (MODELS[name][1], 8)]
    whole = timm.create_model(name, pretrained=False).eval()
    own = {k.removeprefix("model."): v for k, v in encoder.body.state_dict().items()}
    assert whole.state_dict().keys() > own.keys()                                      # what comes later is not built
    whole.load_state_dict(own, strict=False)
    x = torch.rand(2, 3, 40, 56, generator=make_generator(0))
    seen = whole.forward_intermediates((x-encoder.mean)/encoder.std, intermediates_only=True)
    theirs = {m.shape[-1]: m for m in seen}
    for m, width in zip(encoder(x), (14, 7), strict=True):
        assert m.shape[-1] == width and torch.equal(m, theirs[width])


def test_a_network_segments_learns_and_goes_through_a_file(timm, tmp_path):
    config = timm_vos("mobilenetv3_small_050")
    assert config.widths == (8, 16) and config.bank.query_channels == 16 and config.decoder_width == (96, 48)
    clip = ChameleonConfig(frames=3, size=32, stay=(3, 4), fade=2)
    training = ChameleonTraining(config, stages=(ChameleonPhase(2, 1, clip),), modes=(2,), objects=(1,), slots=(3,))
    network = load(fit(ChameleonTask(training), FitConfig(), tmp_path, "cpu", progress=False))
    assert network.config == config and network.feature_stride == 8
    shown = chameleon(0, clip)
    found = list(VideoSegmenter(network).track(shown.frames, masks={0: shown.masks[0]}))
    assert len(found) == 3 and found[0].shape == (32, 32)


def test_the_same_small_network_as_before():
    assert (small_vos().widths, small_vos().decoder_width, small_vos().bank.query_channels) == \
        ((16, 24, 128), (96, 48, 32), 128)


def test_weights_of_timm_to_begin_with_learn_slowly(timm, monkeypatch):
    network = VOSModel(timm_vos("resnet18"))
    create, asked = timm.create_model, []

    def ones(name, pretrained, **options):
        asked.append(pretrained)
        body = create(name, pretrained=False, **options)
        for p in body.parameters(): torch.nn.init.ones_(p)
        return body
    monkeypatch.setattr(timm, "create_model", ones)
    load_imagenet_encoder(network)
    assert asked == [True] and all((p == 1).all() for p in network.query_encoder.parameters())
    rest, trunk = weight_groups(network, VideoTraining().backbone, 1.)
    assert {id(p) for p in trunk["params"]} == {id(p) for p in network.query_encoder.parameters()}
    assert trunk["scale"] == .1 and rest["params"]


@pytest.mark.parametrize("name, message", [
    ("resnt18", "encoder: expected a model of timm, found timm:resnt18"),
    ("hf-hub:someone/model", "encoder: expected a model of timm, found timm:hf-hub"),
    ("vit_tiny_patch16_224", "expected maps at strides 4 and 8, found 16, 16, 16"),
    ("swin_tiny_patch4_window7_224", "10x14 and 5x7 from 40x56, found Input height (40) doesn't match model (224)"),
    ("inception_v3", "expected maps of 10x14 and 5x7 from 40x56, found [(6, 10), (2, 4)]")])
def test_models_that_cannot_be_used_are_refused(timm, name, message):
    refused(message, timm_vos, name)


def test_widths_of_another_model_are_refused(timm):
    config = timm_vos("resnet18")
    object.__setattr__(config, "encoder", "timm:convnext_atto")
    refused("widths: expected (40, 80) with timm:convnext_atto, found (64, 128)", VOSModel, config)


def test_without_timm_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("timm:resnet18: expected the package timm, found none: pip install 'stremn[timm]'", timm_vos, "resnet18")
