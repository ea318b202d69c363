"""The page of ``plot_poses``: one row per person with three panels of one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from diffupose.skeleton import Skeleton

DPI = 150

# Blue and orange stay apart in every common form of colour blindness (Okabe and Ito 2008).
_LEFT, _RIGHT, _CENTRE = "#0072b2", "#e06c00", "#5f6670"
_INK, _MUTED, _GRID, _PAPER = "#22262b", "#717983", "#e9ecef", "#f6f7f9"

# All lengths of the page in inches.
_WIDTH, _LEFT_MARGIN, _RIGHT_MARGIN, _GAP = 11.0, 0.2, 0.2, 0.22
_PANEL_WIDTH = (_WIDTH - _LEFT_MARGIN - _RIGHT_MARGIN - 2 * _GAP) / 3
_MAX_PANEL_HEIGHT, _HEADER, _ROW_GAP, _FOOTER = 3.6, 0.86, 0.6, 0.6

_PADDING = 0.12  # metres around a pose
_REACH = 0.75  # metres by which stray hypotheses may widen a panel; beyond they are cut off


@dataclass(frozen=True)
class Row:
    """One person, and the extent of the three panels: boxes are (left, right, top, bottom) in metres, y down.

    Attributes:
        label: Stands above the keypoints.
        note: Stands above the side view.
        keypoints: ``[J, 2]`` pixels, NaN where missing.
        hypotheses: ``[H, J, 3]`` metres.
        pose: ``[J, 3]`` metres.
    """

    label: str
    note: str
    keypoints: np.ndarray
    hypotheses: np.ndarray
    pose: np.ndarray

    @cached_property
    def scale(self) -> tuple[float, np.ndarray]:
        """Pixels per metre, and the pixel ``[2]`` of x = y = 0: they lay the keypoints over the front view."""
        present = np.isfinite(self.keypoints).all(-1)
        if not present.any():
            return 1.0, np.zeros(2)
        points, plane = self.keypoints[present], self.pose[present, :2]
        spread, spread_metres = np.ptp(points, axis=0).max(), np.ptp(plane, axis=0).max()
        scale = float(spread / spread_metres) if spread > 0 and spread_metres > 0 else 200.0
        return scale, (points.max(0) + points.min(0)) / 2 - (plane.max(0) + plane.min(0)) / 2 * scale

    @cached_property
    def boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes ``[4]`` of the keypoints, the front view and the side view."""
        front, side = (_box(self.pose[:, axes], self.hypotheses[..., axes]) for axes in ([0, 1], [2, 1]))
        present = np.isfinite(self.keypoints).all(-1)
        if not present.any():
            return front, front, side
        pixels_per_metre, origin = self.scale
        metres = (self.keypoints[present] - origin) / pixels_per_metre
        return _box(metres, metres), front, side

    @property
    def width(self) -> float:
        """Metres that the widest of the three panels needs."""
        return max(float(box[1] - box[0]) for box in self.boxes) + 2 * _PADDING

    @property
    def top(self) -> float:
        """Upper end, y in metres, of the range that the three panels share."""
        return min(float(box[2]) for box in self.boxes) - _PADDING

    @property
    def bottom(self) -> float:
        """Lower end of that range."""
        return max(float(box[3]) for box in self.boxes) + _PADDING


def _box(points: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return (left, right, top, bottom) of the points and of the samples, which widen it by at most ``_REACH``."""
    low, high = points.min(0), points.max(0)
    flat = samples.reshape(-1, 2)
    low = np.clip(flat.min(0), low - _REACH, low)
    high = np.clip(flat.max(0), high, high + _REACH)
    return np.array([low[0], high[0], low[1], high[1]])


def draw_page(rows: Sequence[Row], skeleton: Skeleton, footer: str) -> Figure:
    """Return the figure on an Agg canvas of its own, without pyplot, a window or global state."""
    spans = [row.bottom - row.top for row in rows]
    scale = min(_PANEL_WIDTH / max(row.width for row in rows), _MAX_PANEL_HEIGHT / max(spans))  # inches per metre
    page = _HEADER + scale * sum(spans) + _ROW_GAP * (len(rows) - 1) + _FOOTER
    figure = Figure(figsize=(_WIDTH, page))
    FigureCanvasAgg(figure)
    half_width = _PANEL_WIDTH / scale / 2  # metres

    y = page - _HEADER
    _draw_header(figure, y, page, len(rows[0].hypotheses))
    for row, span in zip(rows, spans, strict=True):
        height = scale * span
        y -= height
        lefts = [_LEFT_MARGIN + column * (_PANEL_WIDTH + _GAP) for column in range(3)]
        image, front, side = (
            figure.add_axes((left / _WIDTH, y / page, _PANEL_WIDTH / _WIDTH, height / page)) for left in lefts
        )
        _draw_input(image, row, skeleton, half_width)
        # The axis towards the reader is -z in the front view and +x in the side view, so neither is mirrored.
        _, front_box, side_box = row.boxes
        _draw_view(front, row, skeleton, half_width, front_box, horizontal=0, nearness=-row.pose[:, 2])
        _draw_view(side, row, skeleton, half_width, side_box, horizontal=2, nearness=row.pose[:, 0])
        _draw_scale_bar(front, float(front.get_xticks()[0]), 0.5, "0.5 m")
        side.tick_params(axis="x", labelbottom=True)
        _note(image, row.label)
        if row.note:
            _note(side, row.note)
        y -= _ROW_GAP
    side.set_xlabel("depth in metres, away from the camera \N{RIGHTWARDS ARROW}", size=10, color=_MUTED, labelpad=4)
    figure.text(_LEFT_MARGIN / _WIDTH, 0.2 / page, footer, ha="left", va="center", size=10, color=_MUTED)
    return figure


def _draw_header(figure: Figure, y: float, page: float, num_hypotheses: int) -> None:
    """Write the three headings and the legend above height ``y``."""
    for column, heading in enumerate(("input keypoints", "front", "side")):
        x = (_LEFT_MARGIN + column * (_PANEL_WIDTH + _GAP)) / _WIDTH
        figure.text(x, (y + 0.12) / page, heading, ha="left", va="baseline", size=13, weight="bold", color=_INK)
    thin = "1 hypothesis" if num_hypotheses == 1 else f"{num_hypotheses} hypotheses"
    handles = [
        Line2D([], [], color=_LEFT, linewidth=3, label="left of the person"),
        Line2D([], [], color=_RIGHT, linewidth=3, label="right of the person"),
        Line2D([], [], color=_CENTRE, linewidth=3, label="aggregate"),
        Line2D([], [], color=_CENTRE, linewidth=1.5, alpha=0.4, label=thin),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(_LEFT_MARGIN / _WIDTH, 1 - 0.1 / page),
        ncols=4,
        frameon=False,
        fontsize=10.5,
        labelcolor=_INK,
        handlelength=1.6,
        columnspacing=2.2,
        borderpad=0,
        borderaxespad=0,
    )


def _draw_input(axes: Axes, row: Row, skeleton: Skeleton, half_width: float) -> None:
    """Draw the keypoints on a pale card, at the place and size of the front view."""
    pixels_per_metre, origin = row.scale
    centre = row.boxes[0][:2].mean()
    left, right = (origin[0] + pixels_per_metre * x for x in (centre - half_width, centre + half_width))
    top, bottom = (origin[1] + pixels_per_metre * y for y in (row.top, row.bottom))
    _prepare(axes, (left, right), (bottom, top), grid=False)
    bones = [edge for edge in skeleton.edges if np.isfinite(row.keypoints[list(edge)]).all()]
    present = np.flatnonzero(np.isfinite(row.keypoints).all(-1))
    _draw_pose(axes, row.keypoints, bones, present, skeleton)
    if not len(present):
        axes.text(0.5, 0.5, "no keypoints", transform=axes.transAxes, ha="center", va="center", size=10, color=_MUTED)
    else:
        # The largest of 1, 2 or 5 times a power of ten that a quarter of the panel holds.
        room = (right - left) / 4
        power = 10.0 ** np.floor(np.log10(room))
        length = power * max(step for step in (1, 2, 5) if step * power <= room)
        _draw_scale_bar(axes, left, float(length), f"{length:g} px")


def _draw_view(
    axes: Axes,
    row: Row,
    skeleton: Skeleton,
    half_width: float,
    box: np.ndarray,
    *,
    horizontal: int,
    nearness: np.ndarray,
) -> None:
    """Draw all hypotheses and the aggregate against ``-y``; bones nearer to the viewer come last."""
    centre = box[:2].mean()
    _prepare(axes, (centre - half_width, centre + half_width), (-row.bottom, -row.top), grid=True)
    flatten = np.array([1.0, -1.0])
    samples = row.hypotheses[..., [horizontal, 1]] * flatten  # [H, J, 2]
    bones = sorted(skeleton.edges, key=lambda edge: float(nearness[list(edge)].sum()))
    segments = samples[:, np.array(bones)].reshape(-1, 2, 2)  # [H * bones, 2, 2]
    colors = [_color(skeleton, child) for _, child in bones] * len(samples)
    alpha = float(np.clip(2 / len(samples), 0.05, 0.6))
    axes.add_collection(LineCollection(list(segments), colors=colors, linewidths=1.5, alpha=alpha, zorder=2))
    joints = np.argsort(nearness, kind="stable")
    _draw_pose(axes, row.pose[:, [horizontal, 1]] * flatten, bones, joints, skeleton)


def _draw_pose(
    axes: Axes, points: np.ndarray, bones: Sequence[tuple[int, int]], joints: np.ndarray, skeleton: Skeleton
) -> None:
    """Draw one thick skeleton, each bone with a white rim so that crossings and the hypotheses below stay readable."""
    for order, (parent, child) in enumerate(bones):
        x, y = points[[parent, child]].T
        zorder = 3 + order / 100
        axes.plot(x, y, color="white", linewidth=4.2, alpha=0.85, solid_capstyle="butt", zorder=zorder)
        axes.plot(x, y, color=_color(skeleton, child), linewidth=2.6, solid_capstyle="round", zorder=zorder + 0.005)
    colors = [_color(skeleton, int(joint)) for joint in joints]
    x, y = points[joints].T
    axes.scatter(x, y, s=22, c=colors, edgecolors="white", linewidths=0.8, zorder=5)


def _color(skeleton: Skeleton, joint: int) -> str:
    """Return the colour of a joint and of the bone that ends in it."""
    return _LEFT if joint in skeleton.joints_left else _RIGHT if joint in skeleton.joints_right else _CENTRE


def _prepare(axes: Axes, x_limits: tuple[float, float], y_limits: tuple[float, float], *, grid: bool) -> None:
    """Set the limits and take the frame away; ``grid`` draws lines every half metre, else the panel is a pale card."""
    axes.set_xlim(*x_limits)
    axes.set_ylim(*y_limits)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.set_facecolor("white")
        axes.set_xticks(_half_metres(*x_limits))
        axes.set_yticks(_half_metres(*y_limits))
        axes.xaxis.set_major_formatter("{x:.1f}")
        axes.grid(True, color=_GRID, linewidth=0.9, linestyle="-")
        axes.tick_params(length=0, labelbottom=False, labelleft=False, labelsize=9.5, labelcolor=_MUTED, pad=4)
    else:
        axes.set_facecolor(_PAPER)
        axes.set_xticks([])
        axes.set_yticks([])


def _half_metres(low: float, high: float) -> np.ndarray:
    """Return the multiples of 0.5 between two limits, with a margin for their labels."""
    margin = 0.04 * (high - low)
    return 0.5 * np.arange(np.ceil(2 * (low + margin)), np.floor(2 * (high - margin)) + 1)


def _draw_scale_bar(axes: Axes, start: float, length: float, text: str) -> None:
    """Draw a bar of ``length`` data units from ``start``, below the panel, where no pose can cover it."""
    inches = cast("Figure", axes.figure).dpi_scale_trans
    below = axes.get_xaxis_transform() + ScaledTranslation(0, -11 / 72, inches)
    x = [start, start + length]
    axes.plot(x, [0, 0], transform=below, color=_MUTED, linewidth=2.2, solid_capstyle="butt", clip_on=False)
    axes.annotate(
        text, (x[1], 0), (6, 0), below, "offset points", va="center_baseline", size=9.5, color=_MUTED,
        annotation_clip=False,
    )  # fmt: skip


def _note(axes: Axes, text: str) -> None:
    """Write a small text above the right end of a panel; a dollar sign starts no formula."""
    axes.annotate(
        text, (1, 1), (0, 8.6), "axes fraction", "offset points", ha="right", va="baseline", size=10, color=_INK,
        parse_math=False,
    )  # fmt: skip
