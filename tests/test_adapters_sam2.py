"""Rules in SAM 2: equal to upstream where the rule is upstream's, constant memory for each object, after any prompt."""
import copy
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Sam2VideoConfig, Sam2VideoInferenceSession, Sam2VideoModel  # noqa: E402

from stremn.adapters import held_bytes, with_rule  # noqa: E402
from stremn.core import StremnError  # noqa: E402
from stremn.memory.bank import UpdatePolicy  # noqa: E402
from stremn.memory.rules import RULES, all_rules, pick  # noqa: E402

SIDE, SLOTS = 64, 4
BACKBONE = {"model_type": "sam2_hiera_det_model", "image_size": [SIDE, SIDE], "hidden_size": 8,
            "embed_dim_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1] * 4, "global_attention_blocks": [],
            "num_attention_heads_per_stage": [1] * 4, "window_size_per_stage": [4, 4, 4, 2]}
VISION = {"model_type": "sam2_vision_model", "backbone_config": BACKBONE, "backbone_channel_list": [64, 32, 16, 8],
          "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 128}


SIZES = {"image_size": SIDE, "num_maskmem": SLOTS, "memory_encoder_hidden_size": 128,
         "memory_attention_hidden_size": 128, "memory_attention_num_layers": 1,
         "memory_attention_rope_feat_sizes": [4, 4], "memory_fuser_embed_dim": 128,
         "mask_downsampler_embed_dim": 128, "max_object_pointers_in_encoder": 6}
DECODER = {"hidden_size": 128, "mlp_dim": 64, "num_attention_heads": 2}
PROMPTS = {"hidden_size": 128, "image_size": SIDE, "patch_size": 16}


def network(kind, config, vision):
    "Random weights, large enough that masks follow what is remembered."
    torch.manual_seed(0)
    model = kind(config(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER, **SIZES))
    model.eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += .1 * torch.randn(p.shape, generator=g)
    return model


@pytest.fixture(scope="module")
def plain():
    "A tiny SAM 2."
    return network(Sam2VideoModel, Sam2VideoConfig, VISION)


@pytest.fixture
def sam2(plain):
    "The same network, to be changed."
    return copy.deepcopy(plain)


@pytest.fixture(scope="module")
def video():
    "Noise on a brightness that jumps every fourth frame."
    g = torch.Generator().manual_seed(2)
    scene = torch.randn(5, 3, 1, 1, generator=g).repeat_interleave(4, 0)
    return scene + .5 * torch.randn(20, 3, SIDE, SIDE, generator=g)


def prompt(session, name=1, frame=0, corner=10):
    "Mark an object."
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., corner:corner + 30, 10:40] = 1
    session.add_mask_inputs(session.obj_id_to_idx(name), frame, mask)
    session.obj_with_new_inputs.append(name)


def started(video=None, objects=1):
    "A session whose first frame is prompted."
    session = Sam2VideoInferenceSession(video, SIDE, SIDE, dtype=torch.float32)
    for i in range(objects):
        prompt(session, i + 1, corner=10 + 15 * i)
    return session


def track(model, session, **options):
    "All masks, (T,O,h,w)."
    options = {"start_frame_idx": 0} | options
    return torch.stack([out.pred_masks[:, 0] for out in model.propagate_in_video_iterator(session, **options)])


def stream(model, session, frames):
    "All masks of frames that come one by one."
    return torch.stack([model(session, frame=frame).pred_masks[:, 0] for frame in frames])


def kept(session, i=0):
    "Frames that an object's memory holds, in order."
    return sorted(session.output_dict_per_obj[i]["memory"].frames[0].tolist())


def whole(session, i=0):
    "Frames whose features the session holds."
    held = session.output_dict_per_obj[i]
    return sorted(f for key in ("cond_frame_outputs", "non_cond_frame_outputs") for f, output in held[key].items()
                  if "maskmem_features" in output)


# ---- the queue is what upstream does -------------------------------------------------------------------------------

@pytest.mark.parametrize("objects", [1, 2])
def test_the_queue_gives_upstream_s_masks(plain, sam2, video, objects):
    expected = track(plain, started(video, objects))
    session = started(video, objects)
    assert torch.equal(track(with_rule(sam2, "oldest"), session), expected)
    assert kept(session) == whole(session) == [0, 17, 18, 19] and expected.shape[:2] == (20, objects)
    assert len(expected.flatten(1).unique(dim=0)) > 10, "masks that are all alike would prove nothing"


def test_a_stream_gives_upstream_s_masks_too(plain, sam2, video):
    expected = stream(plain, started(), video)
    assert torch.equal(stream(with_rule(sam2, "oldest"), started(), video), expected)


def test_the_tracker_of_sam_3_has_the_same_memory(video):
    from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel
    backbone = {"model_type": "sam3_vit_model", "image_size": SIDE, "patch_size": 16, "hidden_size": 32,
                "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "global_attn_indexes": [0],
                "pretrain_image_size": SIDE, "window_size": 2}
    vision = {"model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": 128,
              "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    model = network(Sam3TrackerVideoModel, Sam3TrackerVideoConfig, vision)
    expected, session = track(model, started(video)), started(video)
    assert torch.equal(track(with_rule(model, "oldest"), session), expected) and kept(session) == [0, 17, 18, 19]
    assert not torch.equal(track(with_rule(model, "newest"), started(video)), expected)


def test_backward_too(plain, sam2, video):
    def there_and_back(model):
        session = Sam2VideoInferenceSession(video, SIDE, SIDE, dtype=torch.float32)
        prompt(session, frame=19)
        return track(model, session, start_frame_idx=19, reverse=True), session
    expected, _ = there_and_back(plain)
    masks, session = there_and_back(with_rule(sam2, "oldest"))
    assert torch.equal(masks, expected) and [-f for f in kept(session)] == [19, 2, 1, 0]


def test_the_test_can_tell_what_is_read(plain, sam2, video):
    "Fewer slots than upstream reads, or other codes of time, and the masks differ."
    expected = track(plain, started(video))
    assert not torch.equal(track(with_rule(sam2, "oldest", slots=3), started(video)), expected)
    masks = track(with_rule(sam2, "oldest"), started(video))
    assert torch.equal(masks, expected)
    with torch.no_grad():
        sam2.memory_temporal_positional_encoding += torch.arange(4.)[:, None, None, None]
    assert not torch.equal(track(sam2, started(video)), expected)


# ---- other rules ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*all_rules()])
def test_every_rule_runs(sam2, video, name):
    session = started(video[:12])
    assert track(with_rule(sam2, name), session).isfinite().all()
    assert kept(session)[0] == 0 and len(kept(session)) == UpdatePolicy(name, SLOTS).capacity
    assert whole(session) == kept(session)


@pytest.mark.parametrize("name", ["newest", "diversity", "coverage_object"])
def test_another_rule_changes_the_masks(plain, sam2, video, name):
    session = started(video)
    masks, expected = track(with_rule(sam2, name), session), track(plain, started(video))
    assert torch.equal(masks[:4], expected[:4]) and not torch.equal(masks, expected)
    assert kept(session) != [0, 17, 18, 19]


def test_what_the_rule_keeps_is_what_is_read(sam2, video):
    "The stack keeps 0, 1, 2 and the last; rank 1 is the latest, and prompts come first."
    session = started(video)
    track(with_rule(sam2, "newest"), session)
    read = sam2._gather_memory_frame_outputs(session, 0, 20)
    held = session.output_dict_per_obj[0]
    frames = [held["cond_frame_outputs"][0], *(held["non_cond_frame_outputs"][f] for f in kept(session)[1:])]
    assert [place for place, _ in read] == [0, 3, 2, 1] and kept(session) == [0, 1, 2, 19]
    assert all(output is frame for (_, output), frame in zip(read, frames, strict=True))
    assert [place for place, _ in sam2._gather_memory_frame_outputs(session, 0, 2)] == [0, 1]  # never the future


def test_more_slots_than_codes_of_time(sam2, video):
    session = started(video)
    track(with_rule(sam2, "oldest", slots=7), session)
    read = sam2._gather_memory_frame_outputs(session, 0, 20)
    assert kept(session) == [0, 14, 15, 16, 17, 18, 19] and [place for place, _ in read] == [0, 3, 3, 3, 3, 2, 1]


def test_a_rule_of_one_s_own_sees_frames_and_masks(sam2, video):
    "A wrapped record and a function; the first drops even frames, and is asked by each object by itself."
    seen = []

    def odd(r):
        seen.append(r.compare(lambda c: c.masks.mean(-1)))
        return pick(1 - r.frames % 2, r.candidates)
    session = started(video, objects=2)
    track(with_rule(sam2, replace(RULES["oldest"], select=odd, needs_masks=True)), session)
    assert all(f % 2 for f in kept(session)[1:-1]) and seen[0].shape == (1, SLOTS + 1, 2)
    assert len(seen) == 2 * 16 and not torch.equal(seen[0], seen[1])
    session = started(video)
    track(with_rule(sam2, lambda r: torch.zeros(r.frames.shape)), session)
    assert kept(session) == [0, 1, 2, 3]                                     # all newcomers are discarded


def test_objects_decide_for_themselves(sam2, video):
    torch.manual_seed(3)
    session = started(video, objects=2)
    track(with_rule(sam2, "random", slots=8), session)
    assert len(kept(session)) == len(kept(session, 1)) == 8 and kept(session) != kept(session, 1)
    for i in (0, 1):
        assert whole(session, i) == kept(session, i)
        for f in kept(session, i)[1:]:
            output = session.output_dict_per_obj[i]["non_cond_frame_outputs"][f]
            features = output["maskmem_features"]
            assert "high_res_masks" not in output and features.untyped_storage().nbytes() == features.nbytes


def test_roles_and_strides_of_a_policy(sam2, video):
    session = started(video)
    track(with_rule(sam2, UpdatePolicy("newest", SLOTS, latest="held")), session)
    assert kept(session) == [0, 1, 18, 19]
    session = started(video)
    track(with_rule(sam2, UpdatePolicy("oldest", SLOTS, every=5)), session)
    assert kept(session) == [0, 5, 10, 15]
    session = started(video)
    track(with_rule(sam2, UpdatePolicy("oldest", 1)), session)
    assert kept(session) == [0]
    session = started(video)
    track(with_rule(sam2, UpdatePolicy("oldest", SLOTS, pinned=2)), session)
    assert kept(session) == [0, 18, 19]                                      # two slots are for prompts
    session = started(video)
    track(with_rule(sam2, "oldest", slots=math.inf), session)
    assert kept(session) == list(range(20))


# ---- prompts -------------------------------------------------------------------------------------------------------

def test_a_second_prompt_is_pinned_and_adds_a_slot(sam2, video):
    session = started()
    with_rule(sam2, "oldest")
    stream(sam2, session, video[:8])
    prompt(session, frame=8)
    stream(sam2, session, video[8:])
    assert kept(session) == [0, 8, 17, 18, 19] and [*session.output_dict_per_obj[0]["cond_frame_outputs"]] == [0, 8]


def test_a_corrected_prompt_is_what_the_memory_holds(sam2, video):
    session = started(video)
    with_rule(sam2, "oldest")
    track(sam2, session)
    before = session.output_dict_per_obj[0]["memory"]
    prompt(session, corner=30)
    track(sam2, session, max_frame_num_to_track=0)
    after = session.output_dict_per_obj[0]["memory"]
    features = session.output_dict_per_obj[0]["cond_frame_outputs"][0]["maskmem_features"]
    assert torch.equal(after.keys[0, 0].flatten(1).T, features[:, 0])
    assert not torch.equal(after.keys[0, 0], before.keys[0, 0]) and after.seen == before.seen


def test_a_frame_seen_again_is_held_once(sam2, video):
    session = started(video)
    with_rule(sam2, "oldest")
    track(sam2, session)
    track(sam2, session, start_frame_idx=19)
    assert kept(session) == whole(session) == [0, 17, 18, 19]
    track(sam2, session, start_frame_idx=18, reverse=True, max_frame_num_to_track=10)
    assert whole(session) == sorted(-f for f in kept(session)) == [0, 8, 9, 10]


def test_a_reset_session_begins_anew(sam2, video):
    session = started(video)
    first = track(with_rule(sam2, "diversity"), session)
    session.reset_tracking_data()
    prompt(session)
    assert torch.equal(track(sam2, session), first)


# ---- bytes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("objects", [1, 2])
def test_bytes_are_flat_where_upstream_grows(plain, sam2, video, objects):
    "The model itself, on a stream."
    def bytes_after(model):
        session = started(objects=objects)
        held = []
        for frame in video:
            model(session, frame=frame.clone())
            held.append(held_bytes(session))
        return held
    upstream, ruled = bytes_after(plain), bytes_after(with_rule(sam2, "oldest"))
    assert all(b > a for a, b in zip(upstream, upstream[1:]))
    assert len(set(ruled[8:])) == 1 and ruled[-1] < upstream[-1]


@pytest.mark.parametrize("name", ["oldest", "random", "coverage_object"])
def test_bytes_are_flat_over_2000_frames(sam2, name):
    "The store alone: outputs of the right shapes, of noise, without the network."
    session = started()
    outputs = session.output_dict_per_obj[0]
    model = with_rule(sam2, name)
    held = []
    for t in range(2000):
        session.store_output(0, t, None, stub(t), is_conditioning_frame=t == 0)
        model.remember(outputs, t, 1)
        held.append(held_bytes(session))
    pointers = model.config.max_object_pointers_in_encoder
    assert len(kept(session)) == SLOTS and kept(session)[0] == 0
    assert len(outputs["non_cond_frame_outputs"]) <= SLOTS + pointers
    spread = max(held[20:]) - min(held[20:])
    assert spread <= pointers * 128 * 4, "nothing but pointers may come and go"
    grown = started()
    for t in range(50):
        grown.store_output(0, t, None, stub(t), is_conditioning_frame=t == 0)
    assert held_bytes(grown) > 2 * max(held)


def stub(t):
    "What SAM 2 notes of a frame, in the shapes of the tiny one."
    g = torch.Generator().manual_seed(t)
    shapes = {"pred_masks": (1, 1, 16, 16), "object_pointer": (1, 1, 128), "high_res_masks": (1, 1, SIDE, SIDE),
              "object_score_logits": (1, 1, 1), "maskmem_features": (16, 1, 64), "maskmem_pos_enc": (16, 1, 64)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def test_pointers_stay_as_long_as_upstream_reads_them(sam2, video):
    session = started(video)
    track(with_rule(sam2, "newest"), session)
    others = session.output_dict_per_obj[0]["non_cond_frame_outputs"]
    assert sorted(others) == [1, 2, 15, 16, 17, 18, 19] and [*others[16]] == ["object_pointer"]


# ---- refusals ------------------------------------------------------------------------------------------------------

def test_refusals(sam2):
    for rule, message in (("oldset", "policy: expected one of"), (3, "policy: expected one of")):
        with pytest.raises(StremnError, match=message):
            with_rule(sam2, rule)
    with pytest.raises(StremnError, match="slots: expected"):
        with_rule(sam2, "oldest", slots=-1)
    with pytest.raises(StremnError, match="model: expected a Sam2VideoModel .*found Linear"):
        with_rule(torch.nn.Linear(1, 1), "oldest")
    assert type(sam2) is Sam2VideoModel, "a refused model is left as it was"


def test_a_second_rule_replaces_the_first(sam2):
    before = set(sam2.state_dict())
    assert with_rule(with_rule(sam2, "newest"), "oldest", slots=3) is sam2
    assert sam2.bank.policy == UpdatePolicy("oldest", 3) and type(sam2).__name__ == "Sam2VideoModel"
    assert isinstance(sam2, Sam2VideoModel) and set(sam2.state_dict()) == before
