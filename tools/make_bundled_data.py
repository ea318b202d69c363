"""Make the bundled example keypoints and the bundled evaluation sample from UI-PRMD motion capture.

    python tools/make_bundled_data.py MOCAP_TRAIN.npz MOCAP_VAL.npz

Only UI-PRMD (Vakanski et al. 2018, Open Data Commons Public Domain Dedication) goes into the package. The example is
synthetic: poses seen through a virtual camera, with detector noise, written in COCO-results form.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from diffupose.camera import project
from diffupose.datasets.mocap import SAMPLE_SUBJECTS, SELECTION_SUBJECTS, Mocap, load_mocap
from diffupose.datasets.virtual_cameras import EVALUATION_RANGES, Views, choose_views, turn_heading, wild_views
from diffupose.files import atomic_path

PACKAGE = Path(__file__).resolve().parents[1] / "diffupose"
NUM_EVALUATED, NUM_REFERENCE, NUM_PEOPLE = 300, 1000, 3
COCO_LIMBS = (11, 14, 12, 15, 13, 16, 4, 1, 5, 2, 6, 3)
"""Human3.6M joints in COCO order 5..16: left shoulder, right shoulder, left elbow, ... ankles."""


def main() -> None:
    """Write ``data/sample_uiprmd.npz``, ``examples/keypoints.json`` and ``examples/images.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train")
    parser.add_argument("val")
    options = parser.parse_args()
    train = load_mocap(options.train, exclude=SELECTION_SUBJECTS)
    train = train.select(np.char.startswith(train.subject, "uiprmd"))
    val = load_mocap(options.val, include=SAMPLE_SUBJECTS)
    generator = np.random.default_rng(0)
    write_sample(pick(val, NUM_EVALUATED, generator), pick(train, NUM_REFERENCE, generator))
    write_example(val)


def pick(mocap: Mocap, count: int, generator: np.random.Generator) -> Mocap:
    """Return ``count`` poses in the order of the file."""
    return mocap.select(np.sort(generator.permutation(len(mocap.positions))[:count]))


def facing(views: Views) -> torch.Tensor:
    """Return who is seen whole and three quarters from the front, ``[B]``: such a picture explains itself."""
    shoulders = torch.nn.functional.normalize(views.poses_3d[:, 11] - views.poses_3d[:, 14], dim=-1)
    return (shoulders[:, 0] > 0.6) & (shoulders[:, 0] < 0.95) & ~views.outside.any(dim=1)


def write_sample(evaluated: Mocap, reference: Mocap) -> None:
    """Write both as one motion-capture npz with one clip per subject."""
    subject = np.concatenate((evaluated.subject, reference.subject))
    names, clip_index = np.unique(subject, return_inverse=True)
    positions = np.concatenate((evaluated.positions, reference.positions)).round(4).astype(np.float32)
    with atomic_path(PACKAGE / "data" / "sample_uiprmd.npz") as path:
        np.savez_compressed(
            path,
            positions=positions,
            clip_index=clip_index.astype(np.int32),
            clip_subject=names,
            clip_source=np.full(len(names), "uiprmd"),
        )


def coco_joints(poses: torch.Tensor) -> torch.Tensor:
    """Return COCO-17 joints of Human3.6M-17 poses ``[B, 17, 3]``, with a face that the reader maps back."""
    thorax, neck, head = poses[:, 8], poses[:, 9], poses[:, 10]
    ears = thorax + (head - thorax) / 1.14
    nose = 2.0 * (thorax + (neck - thorax) / 0.70) - ears
    side = torch.nn.functional.normalize(poses[:, 11] - poses[:, 14], dim=-1)  # to the person's left
    up = torch.nn.functional.normalize(ears - thorax, dim=-1)
    eyes = 0.6 * nose + 0.4 * ears + 0.02 * up
    face = [nose, eyes + 0.032 * side, eyes - 0.032 * side, ears + 0.072 * side, ears - 0.072 * side]
    return torch.cat((torch.stack(face, dim=1), poses[:, list(COCO_LIMBS)]), dim=1)


def write_example(mocap: Mocap) -> None:
    """Write a few people in COCO-results form: two share an image, and one frame is empty."""
    generator = torch.Generator().manual_seed(21)
    # Poses in which hands and feet are away from the body, but not the extremes; far from each other.
    relative = mocap.positions - mocap.positions[:, :1]
    spread = np.linalg.norm(relative[:, [3, 6, 13, 16], :2], axis=-1).sum(axis=1)
    low, high = np.quantile(spread, (0.6, 0.85))
    allowed = (spread > low) & (spread < high)
    chosen = [int(np.flatnonzero(allowed)[0])]
    while len(chosen) < NUM_PEOPLE:
        distance = np.linalg.norm(relative[:, None] - relative[None, chosen], axis=-1).mean(axis=-1).min(axis=1)
        chosen.append(int(np.where(allowed, distance, -1.0).argmax()))
    positions = torch.from_numpy(mocap.positions[chosen])
    candidates = [wild_views(turn_heading(positions, generator), EVALUATION_RANGES, generator) for _ in range(1000)]
    views = choose_views([view for view in candidates if facing(view).all()])
    joints = coco_joints(views.poses_3d) + views.root[:, None]
    keypoints = project(joints, views.focal, views.center)
    side = (keypoints.amax(dim=1) - keypoints.amin(dim=1)).amax(dim=-1)
    keypoints = keypoints + 0.008 * side[:, None, None] * torch.randn(keypoints.shape, generator=generator)
    scores = 0.75 + 0.24 * torch.rand(keypoints.shape[:2], generator=generator)
    results, images = [], []
    for row, size in enumerate(views.image_size.tolist()):
        # The last person shares the image of the first one of the same size, if there is one.
        image_id = row + 1
        if row == NUM_PEOPLE - 1:
            image_id = next((i["id"] for i in images if [i["width"], i["height"]] == size), image_id)
        if image_id == row + 1:
            name = f"synthetic_{image_id:02d}.jpg"
            images.append({"id": image_id, "file_name": name, "width": int(size[0]), "height": int(size[1])})
        points = torch.cat((keypoints[row], scores[row, :, None]), dim=-1)
        results.append(
            {
                "image_id": image_id,
                "category_id": 1,
                "keypoints": [round(value, 2) for value in points.flatten().tolist()],
                "score": round(float(scores[row].mean()), 3),
            }
        )
    images.append({"id": NUM_PEOPLE + 1, "file_name": "synthetic_empty.jpg", "width": 1280, "height": 720})
    info = "Synthetic: UI-PRMD motion capture (public domain dedication) seen by virtual cameras, with detector noise."
    for name, content in (("keypoints", results), ("images", {"info": {"description": info}, "images": images})):
        with atomic_path(PACKAGE / "examples" / f"{name}.json") as path:
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
