"""From pixels to what the denoiser sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffupose.camera import normalize_screen_coordinates, person_box, project
from diffupose.conditioning import make_conditioning, mirror_condition
from diffupose.config import PAPER, PARALLEL
from diffupose.mean_pose import fill_missing_joints

IMAGE_WITH_PRESENCE = replace(PAPER, denoiser=replace(PAPER.denoiser, condition_channels=3))
PERSON_WITHOUT_PRESENCE = replace(PAPER, input_normalization="person")


@pytest.fixture
def views():
    """People seen by pinhole cameras: poses, roots, pixels, focal lengths, principal points, image sizes."""
    poses = 0.4 * torch.randn(12, 17, 3, dtype=torch.float64)
    poses = poses - poses[:, :1]
    root = torch.stack((2 * torch.rand(12) - 1, torch.rand(12) - 0.5, 3 + 3 * torch.rand(12)), dim=-1).double()
    size = torch.tensor([[1280.0, 720.0], [1000.0, 1000.0]]).double().repeat(6, 1)
    focal = (0.8 + 0.8 * torch.rand(12, 1).double()) * torch.tensor([1000.0, 1050.0]).double()
    center = size / 2
    return poses, root, project(poses + root[:, None], focal, center), focal, center, size


def test_image(views):
    _, _, pixels, focal, center, size = views
    seen = make_conditioning(
        pixels, torch.ones(12, 17, dtype=torch.bool), PAPER, image_size=size, focal=focal, center=center
    )
    assert torch.equal(seen.condition, normalize_screen_coordinates(pixels, size.unsqueeze(1)))
    assert torch.equal(seen.rotation, torch.eye(3).double().expand(12, 3, 3))


def test_image_needs_the_size(views):
    with pytest.raises(ValueError, match="image_size is needed"):
        make_conditioning(views[2], torch.ones(12, 17, dtype=torch.bool), PAPER)


def test_person_known_values():
    pixels = torch.tensor([[[100.0, 200.0], [140.0, 300.0], [120.0, 230.0]]])
    seen = make_conditioning(pixels, torch.ones(1, 3, dtype=torch.bool), PARALLEL)
    torch.testing.assert_close(
        seen.condition, torch.tensor([[[-0.4, -1.0, 1.0], [0.4, 1.0, 1.0], [0.0, -0.4, 1.0]]]), atol=1e-6, rtol=0
    )
    assert torch.equal(seen.rotation, torch.eye(3)[None])


def test_person_turns_the_camera_towards_the_person(views):
    """The turned camera sees the centre of the box on its axis, and turning back recovers the poses."""
    poses, root, pixels, focal, center, _ = views
    present = torch.ones(12, 17, dtype=torch.bool)
    seen = make_conditioning(pixels, present, PARALLEL, focal=focal, center=center)
    box_center, scale = person_box(pixels, present)
    ray = torch.cat(((box_center - center) / focal, torch.ones(12, 1).double()), dim=1)
    turned_ray = (seen.rotation @ ray.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(turned_ray[:, :2], torch.zeros(12, 2).double(), atol=1e-12, rtol=0)
    assert (turned_ray[:, 2] > 0).all()
    target = poses @ seen.rotation.mT  # what a network learns
    torch.testing.assert_close(target @ seen.rotation, poses)
    # A pixel is the same ray, seen by either camera.
    points = (poses + root[:, None]) @ seen.rotation.mT
    rays = torch.cat(((pixels - center[:, None]) / focal[:, None], torch.ones(12, 17, 1).double()), dim=-1)
    rays = rays @ seen.rotation.mT
    torch.testing.assert_close(points[..., :2] / points[..., 2:], rays[..., :2] / rays[..., 2:])
    torch.testing.assert_close(seen.condition[..., :2] * scale[:, None] + box_center[:, None], pixels)


def test_person_does_not_see_where_the_person_stands(views):
    _, _, pixels, focal, center, _ = views
    present = torch.rand(12, 17) > 0.2
    here = make_conditioning(pixels, present, PARALLEL, focal=focal, center=center)
    there = make_conditioning(3.0 * pixels + 250.0, present, PARALLEL, focal=focal, center=center)
    torch.testing.assert_close(here.condition, there.condition)
    assert (here.rotation - there.rotation).abs().max() > 0.1


@pytest.mark.parametrize("config", [PARALLEL, IMAGE_WITH_PRESENCE], ids=["person", "image"])
def test_missing_joints_are_zero_and_marked(views, config):
    _, _, pixels, focal, center, size = views
    present = torch.rand(12, 17) > 0.2
    present[0] = True
    given = torch.where(present.unsqueeze(-1), pixels, torch.nan)
    seen = make_conditioning(given, present, config, image_size=size, focal=focal, center=center)
    assert torch.equal(seen.condition[..., 2], present.double())
    assert (seen.condition[~present] == 0).all()
    assert seen.condition.isfinite().all() and seen.rotation.isfinite().all()
    assert (seen.condition[present][:, :2] != 0).any(dim=-1).all()


@pytest.mark.parametrize("config", [PAPER, PERSON_WITHOUT_PRESENCE], ids=["image", "person"])
def test_missing_joints_are_filled_without_a_presence_channel(views, config):
    _, _, pixels, focal, center, size = views
    present = torch.rand(12, 17) > 0.2
    given = torch.where(present.unsqueeze(-1), pixels, torch.nan)
    seen = make_conditioning(given, present, config, image_size=size, focal=focal, center=center)
    filled = fill_missing_joints(given, present)
    everything = torch.ones_like(present)
    expected = make_conditioning(filled, everything, config, image_size=size, focal=focal, center=center)
    assert seen.condition.shape == (12, 17, 2)
    assert torch.equal(seen.condition, expected.condition) and torch.equal(seen.rotation, expected.rotation)


CUE = replace(PARALLEL, denoiser=replace(PARALLEL.denoiser, camera_cue=True))


def test_camera_cue(views):
    """What is known becomes four channels, the same for all joints; what is assumed becomes zeros."""
    _, _, pixels, focal, center, size = views
    present = torch.ones(12, 17, dtype=torch.bool)
    known = torch.arange(12) % 2 == 0
    seen = make_conditioning(pixels, present, CUE, image_size=size, focal=focal, center=center, camera_known=known)
    assert seen.condition.shape == (12, 17, CUE.denoiser.num_condition_channels) == (12, 17, 7)
    plain = make_conditioning(pixels, present, PARALLEL, image_size=size, focal=focal, center=center)
    assert torch.equal(seen.condition[..., :3], plain.condition)
    cue = seen.condition[..., 3:]
    assert not cue[~known].any()
    assert torch.equal(cue, cue[:, :1].expand_as(cue))
    low, high = pixels.amin(dim=1), pixels.amax(dim=1)
    half = (high - low).amax(dim=1, keepdim=True) / 2
    expected = torch.cat(
        (torch.ones(12, 1), (half / focal).log().mean(dim=1, keepdim=True) + 1.6, ((low + high) / 2 - center) / focal),
        dim=1,
    )
    torch.testing.assert_close(cue[known, 0], expected[known])
    nothing = make_conditioning(pixels, present, CUE, image_size=size)
    assert not nothing.condition[..., 3:].any()


@pytest.mark.parametrize("config", [PAPER, PARALLEL, CUE], ids=["paper", "parallel", "cue"])
def test_mirrored_conditions_are_those_of_the_mirrored_picture(views, config):
    _, _, pixels, focal, center, size = views
    present = torch.rand(12, 17) < 0.9
    present[:, [2, 9]] = True
    flip = [0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13]
    mirrored = pixels[:, flip].clone()
    mirrored[..., 0] = size[:, None, 0] - mirrored[..., 0]  # the principal point is in the middle
    if config is PAPER:
        present[:] = True
    settings = {"image_size": size, "focal": focal, "center": center, "camera_known": True}
    expected = make_conditioning(mirrored, present[:, flip], config, **settings).condition
    torch.testing.assert_close(
        mirror_condition(make_conditioning(pixels, present, config, **settings).condition, config), expected
    )
