"""``diffupose lift``: a detector's keypoints in, 3D poses out."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from diffupose.camera import ASSUMED_FOCAL
from diffupose.commands.say import say as print_line
from diffupose.files import atomic_path, check_output
from diffupose.keypoints import HEAD_RULES, LAYOUTS, Keypoints, read_keypoints
from diffupose.keypoints.openpose import SUFFIX
from diffupose.keypoints.plausible import why_unusable
from diffupose.schedule import SAMPLERS

if TYPE_CHECKING:
    from diffupose.lifting.lifter import Lifter
    from diffupose.lifting.result import LiftResult


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "lift",
        help="lift 2D keypoints to 3D poses",
        description="Lift the people of a keypoint file (COCO results or annotations, OpenPose JSON or folder, npy, "
        "npz) to 3D. Frames without a person are no error.",
    )
    parser.add_argument("file", metavar="FILE", help="keypoint file, or folder of OpenPose files")
    parser.add_argument("--out", default="poses.npz", metavar="PATH", help=".npz or .json (default: %(default)s)")
    parser.add_argument("--plot", metavar="PATH", help="draw input and hypotheses (.png, .pdf, .svg)")
    parser.add_argument("--model", default="mocap", metavar="NAME|PATH", help="model (default: %(default)s, bundled)")
    parser.add_argument("--num-hypotheses", type=int, metavar="N", help="3D poses per person (default: the model's)")
    parser.add_argument("--num-inference-steps", type=int, metavar="S", help="network calls (default: the model's)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the model's")
    parser.add_argument("--eta", type=float, help="fresh noise of the ddim sampler, 0 to 1")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="add hypotheses of the mirrored input")
    parser.add_argument(
        "--aggregation", choices=("mean", "medoid", "density"), help="what poses_3d is (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="64-bit seed (default: %(default)s)")
    parser.add_argument("--image-size", type=float, nargs=2, metavar=("W", "H"), help="image size in pixels")
    parser.add_argument("--annotations", metavar="FILE", help="COCO file whose 'images' list has the image sizes")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="joint order of the file")
    parser.add_argument("--head", choices=HEAD_RULES, default="extrapolated", help="rule for neck and head from faces")
    parser.add_argument("--score-threshold", type=float, default=0.3, metavar="P", help="joints below are missing")
    parser.add_argument(
        "--intrinsics", type=float, nargs=4, metavar=("FX", "FY", "CX", "CY"), help="camera, in pixels, undistorted"
    )
    parser.add_argument(
        "--assumed-focal", type=float, default=ASSUMED_FOCAL, metavar="F",
        help="focal length in longer image sides when there are no intrinsics (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32",
        help="of the network's products; bfloat16 is faster on GPUs and with AVX512-BF16 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Read, lift, write."""
    inputs = {"the input": options.file, "--annotations": options.annotations, "--model": options.model}
    _check_output(options.out, (".npz", ".json"), "--out", inputs)
    if options.plot is not None:
        _check_output(options.plot, (".png", ".pdf", ".svg"), "--plot", {**inputs, "--out": options.out})
    # Loading torch takes seconds: wrong paths were reported before.
    from diffupose.lifting.lifter import Lifter

    lifter = Lifter.from_pretrained(options.model, device=options.device)
    keypoints = read_keypoints(
        options.file,
        layout=options.layout,
        skeleton=lifter.skeleton,
        image_size=options.image_size,
        annotations=options.annotations,
        score_threshold=options.score_threshold,
        head=options.head,
    )
    say = (lambda text: None) if options.quiet else print_line
    for line in _assumptions(options, keypoints, lifter):
        say(line)
    if keypoints.image_size is None and lifter.needs_image_size(options.intrinsics is not None, options.assumed_focal):
        raise ValueError("the image size is needed: give --image-size W H or --annotations FILE (or --intrinsics)")
    result = lifter(
        keypoints.keypoints,
        image_size=keypoints.image_size,
        intrinsics=_matrix(options.intrinsics),
        num_hypotheses=options.num_hypotheses,
        num_inference_steps=options.num_inference_steps,
        sampler=options.sampler,
        eta=options.eta,
        flip=options.flip,
        aggregation=options.aggregation,
        seed=options.seed,
        frame_ids=keypoints.frame_ids,
        assumed_focal=options.assumed_focal,
        on_unusable="nan",
        precision=options.precision,
        progress=not options.quiet,
    )
    lifted = int(result.usable.sum())
    if not lifted:
        raise ValueError(f"no person of {options.file} can be lifted: {_why_skipped(result)}")
    for line in _summary(result, lifter):
        say(line)
    result.meta["source_format"], result.meta["source_layout"] = keypoints.source_format, keypoints.source_layout
    # Either both files appear or neither.
    with nullcontext() if options.plot is None else atomic_path(options.plot) as picture:
        if picture is not None:
            _plot(picture, result, keypoints)
        result.save(options.out, frame=keypoints.frame, person=keypoints.person, image_id=keypoints.image_id)
    if picture is not None:
        say(f"picture:    {options.plot}")
    say(f"poses:      {options.out}")


def _check_output(path: str, suffixes: tuple[str, ...], name: str, others: dict[str, str | None]) -> None:
    """Refuse an output that cannot be written, or that is an input, before any work is done."""
    check_output(path, name, others, suffixes)
    folder = others["the input"]
    if path.endswith(SUFFIX) and folder is not None and Path(path).resolve().parent == Path(folder).resolve():
        raise ValueError(f"{name} must not be one of the input's files, got {path!r}")


def _matrix(intrinsics: list[float] | None) -> list[list[float]] | None:
    if intrinsics is None:
        return None
    fx, fy, cx, cy = intrinsics
    return [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]


def _assumptions(options: argparse.Namespace, keypoints: Keypoints, lifter: Lifter) -> list[str]:
    """Return what was assumed about the file, one line each."""
    frames = f"{keypoints.num_frames} ({keypoints.num_empty_frames} without a person)"
    threshold = (
        "none (scores are not in 0..1)"
        if keypoints.score_threshold is None
        else (f"{keypoints.score_threshold:g} ({keypoints.num_below_threshold} joints below it are missing)")
    )
    if keypoints.image_size is None:
        size = "unknown"
    else:
        sizes = sorted({f"{w:g} x {h:g}" for w, h in keypoints.image_size.tolist()})
        size = ", ".join(sizes[:3]) + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
    if options.intrinsics is not None:
        focal = f"{options.intrinsics[0]:g} px (given)"
    elif lifter.config.input_normalization == "image":
        focal = "none (this model needs none)"
    elif keypoints.image_size is not None:
        lengths = sorted({round(options.assumed_focal * side, 1) for side in keypoints.image_size.max(axis=1).tolist()})
        others = " and others" if len(lengths) > 1 else ""
        focal = f"{lengths[0]:g}{others} px (assumed: {options.assumed_focal:g} x the longer image side)"
    else:
        focal = "unknown"
    return [
        f"file:       {options.file} ({keypoints.source_format})",
        f"layout:     {keypoints.source_layout}, {keypoints.num_source_joints} joints "
        f"-> {keypoints.skeleton.num_joints} joints ({keypoints.skeleton.name})",
        f"people:     {len(keypoints.keypoints)} in frames: {frames}",
        f"threshold:  {threshold}",
        f"image size: {size}",
        f"focal:      {focal}",
        *(f"note:       {note}" for note in keypoints.notes),
    ]


def _summary(result: LiftResult, lifter: Lifter) -> list[str]:
    meta, (rows, count) = result.meta, result.hypotheses.shape[:2]
    sampler = f"{meta['sampler']} in {meta['num_inference_steps']} steps"
    lines = [f"model:      {lifter.config.name}, {sampler}, seed {meta['seed']}"]
    skipped = rows - int(result.usable.sum())
    if skipped:
        lines.append(f"skipped:    {skipped} of {rows} people (NaN rows): {_why_skipped(result)}")
    lines.append(f"lifted:     {rows - skipped} people x {count} hypotheses, metres, camera frame, root-relative")
    return lines


def _why_skipped(result: LiftResult) -> str:
    """Count the people who could not be lifted by reason."""
    problems = Counter(why_unusable(result.keypoints_2d.numpy(force=True), result.skeleton))
    return ", ".join(f"{count} with {problem}" for problem, count in problems.items() if problem is not None)


def _plot(path: Path, result: LiftResult, keypoints: Keypoints) -> None:
    from diffupose.lifting.plot import plot_poses

    labels = [f"{image}, person {person}" for image, person in zip(keypoints.image_id, keypoints.person, strict=True)]
    plot_poses(
        path,
        keypoints.keypoints,
        result.hypotheses.cpu().numpy(),
        result.poses_3d.cpu().numpy(),
        result.skeleton,
        labels=labels,
    )
