"""What the scripts of this folder share: the scores of a cell, and a result that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffupose import Lifter, LiftResult
from diffupose.evaluation.cells import Cell
from diffupose.evaluation.mocap import score_hypotheses
from diffupose.files import atomic_path

RESULTS = Path(__file__).parents[1] / "results"


def score(lifter: Lifter, cell: Cell, result: LiftResult, most: int | None = None) -> dict[str, Any]:
    """Return the scores of all hypotheses of a result, or of the first."""
    return score_hypotheses(result.hypotheses[:, :most].cpu(), cell, lifter.covariance_scale.cpu())


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
