"""Tables: of the times of cases, in Markdown, and between the marks of a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
HEADER = ["case", "variant", "ms", "times eager", "of the floor"]


def markdown(header: list[str], rows: list[list[str]], names: int = 1) -> str:
    """Return a Markdown table, the first columns, names, to the left."""
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [header, *rows]]


def times(rows: list[Row]) -> list[list[str]]:
    """Return what ``HEADER`` names of each row that has a time.

    The eager one beside it is of the same precision where there is one, else of float32.
    """
    rows = [row for row in rows if "milliseconds" in row]
    eager = {(row["case"], _precision(row)): row["milliseconds"] for row in rows if row["variant"].startswith("eager")}
    cells = []
    for row in rows:
        peer = eager.get((row["case"], _precision(row))) or eager.get((row["case"], "fp32"))
        ratio = f"{peer / row['milliseconds']:.2f}" if peer else ""
        name = row["variant"] + (", not in a graph" if row.get("in_graph") is False else "")
        cells.append([row["case"], name, f"{row['milliseconds']:.4g}", ratio, floor(row)])
    return cells


def floor(row: Row) -> str:
    """Return how far a row is from its floor: bytes over the copy rate, or operations over the product rate."""
    for key, of in (("kernel_of_copy_rate", "copy"), ("of_copy_rate", "copy"), ("of_product_rate", "product")):
        if key in row:
            return f"{100 * row[key]:.0f} % ({of})"
    return ""


def _precision(row: Row) -> str:
    return "bf16" if "bf16" in row["variant"] else "fp32"


def rewrite(path: Path, tables: dict[str, str], maker: str, *, check: bool) -> bool:
    """Put tables between their marks in a document, or only check them; return whether they were there already."""
    text = before = path.read_text(encoding="utf-8")
    for name, content in tables.items():
        begin, end = f"<!-- {name}: made by {maker} -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"
    if not check:
        path.write_text(text, encoding="utf-8")
    return text == before
