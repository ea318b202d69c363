"""The ways in which the CUDA engine samples, when each is taken, and where that number is from.

========== ======= ============================ ==================================== =================================
mode       layout  launcher in ``csrc``         what runs                            taken
========== ======= ============================ ==================================== =================================
persistent wgmma   ``launch_sample_wgmma``      one kernel; a thread block takes     Hopper, up to 17 joints: from
                                                eight hypotheses through all layers  ``PERSISTENT_FROM`` on
                                                and steps
persistent pairs   ``launch_sample_persistent`` the same by ``mma`` instructions     where ``wgmma`` cannot run: from
                                                                                     ``PERSISTENT_MMA_FROM`` on
cluster    cluster ``launch_sample_clusters``   one kernel; a cluster of eight       GPUs with clusters: up to
                                                thread blocks, which write into each ``CLUSTER_ROUNDS`` rounds
                                                other's shared memory, takes one
                                                hypothesis through layers and steps
layers     pairs   ``launch_sample_layers``     a kernel a layer, many thread blocks else; as a CUDA graph from the
                                                each                                 second call of a shape on, up to
                                                                                     ``MOST_CAPTURED``
========== ======= ============================ ==================================== =================================

All but the last take bfloat16 only. The measured numbers are of an H200 (PyTorch 2.11, CUDA 13.0, bfloat16, ``paper``
at width 384, ten steps): ``benchmarks/results/h200/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffupose.engines.cuda_runs import HeldProgram
from diffupose.ops._backend import on_device

Mode = Literal["layers", "persistent", "cluster"]

PERSISTENT_FROM = 384
"""Hypotheses. Measured: by layers 2.35 ms at 256 hypotheses and 4.25 ms at 512; persistent 3.3 ms, a tenth of a hundred
steps, at any number up to 1,056, which are eight to each multiprocessor."""

PERSISTENT_MMA_FROM = 384
"""Hypotheses. Not measured: taken over from Hopper's kernel."""

CLUSTER_ROUNDS = 1
"""Rounds of as many hypotheses as there are clusters at the same time. Measured: 10 hypotheses take 0.43 ms, by layers
0.69 ms; 16, which are two rounds, 0.84 ms, and 0.68 ms by layers."""

MOST_CAPTURED = 1024
"""Hypotheses. Not measured: beyond, a layer takes longer than its launch, and a graph would only hold memory."""


@dataclass(frozen=True)
class Way:
    """One way of sampling that this GPU has for a program.

    Attributes:
        held: The program in the layout of the kernels.
        num_blocks: Thread blocks or clusters of the one kernel; 0 for a kernel a layer.
        least, most: The numbers of hypotheses for which it is taken.
    """

    held: HeldProgram
    num_blocks: int = 0
    least: float = 0
    most: float = math.inf


def find_ways(by_layers: HeldProgram, mode: Mode | None) -> dict[Mode, Way]:
    """Return the ways that the GPU of a program has for it, in the order in which they are preferred.

    Args:
        by_layers: The program in the layout ``pairs``.
        mode: The only way that is wanted, or None for all.

    Raises:
        ValueError: If the wanted way cannot run here.
    """
    ways: dict[Mode, Way] = {}
    for name, find in _FINDERS.items():
        if mode not in (None, name):
            continue
        with on_device(by_layers.records):
            takes = name == "layers" or by_layers.precision == "bfloat16"
            way = find(by_layers) if takes else "it takes bfloat16 only"
        if isinstance(way, Way):
            ways[name] = way
        elif mode is not None:
            raise ValueError(f"mode cannot be {mode} here: {way}")
    return ways


def _find_persistent(by_layers: HeldProgram) -> Way | str:
    extension, held, least = by_layers.extension, by_layers, PERSISTENT_MMA_FROM
    if by_layers.program.num_joints <= extension.WGMMA_MAX_JOINTS and extension.wgmma_available():
        held, least = by_layers.in_layout("wgmma"), PERSISTENT_FROM
    tile_bytes = held.packed.tile_bytes
    if tile_bytes > extension.shared_bytes():
        return f"a tile takes {tile_bytes} bytes of shared memory, a block of this GPU has fewer"
    return Way(held, extension.multiprocessors(), least)


def _find_cluster(by_layers: HeldProgram) -> Way | str:
    extension, joints = by_layers.extension, by_layers.program.num_joints
    if extension.clusters_available(joints, 0) == 0:
        return "the GPU has no clusters of blocks"
    held = by_layers.in_layout("cluster")
    needed = extension.cluster_bytes(held.packed.tile_bytes, held.packed.num_layers)
    count = extension.clusters_available(joints, needed)
    if count == 0:
        return f"the GPU has no clusters of blocks with {needed} bytes of shared memory"
    return Way(held, count, most=CLUSTER_ROUNDS * count)


_FINDERS: dict[Mode, Callable[[HeldProgram], Way | str]] = {
    "persistent": _find_persistent,
    "cluster": _find_cluster,
    "layers": Way,
}
