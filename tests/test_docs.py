"""The documents say what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import diffupose
from diffupose.testing import requires_cpp

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("benchmarks", "csrc", "diffupose", "docs", "engines", "kernels", "lifting", "networks", "tests", "tools")

# Lifts a file and prints every function of the package that is called, as module.qualified_name.
TRACE = """
import json, sys
from diffupose.cli import main
called = set()
def note(frame, event, argument):
    module = frame.f_globals.get("__name__", "")
    if event == "call" and module.startswith("diffupose."):
        called.add(module.removeprefix("diffupose.") + "." + frame.f_code.co_qualname)
sys.setprofile(note)
status = main(sys.argv[1:])
sys.setprofile(None)
assert status == 0
print(json.dumps(sorted(called)))
"""


def layers_of_the_contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(item for item in settings["tool"]["importlinter"]["contracts"] if item["id"] == "layers")
    return [re.findall(r"\w+", row) for row in contract["layers"]]


def layers_of_the_picture():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    picture = text.partition("<!-- layers")[2].partition("<!-- end of layers -->")[0]
    rows = picture.partition("```\n")[2].partition("```")[0].splitlines()
    return [re.findall(r"\w+", re.split(r" {2,}", row)[0]) for row in rows]


def test_the_picture_of_the_layers_is_the_contract():
    assert layers_of_the_picture() == layers_of_the_contract()


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:" + "|".join(FOLDERS) + r")/[\w./]+)`(?! at commit)", text)
    missing = [path for path in paths if not ((ROOT / path).exists() or (ROOT / "diffupose" / path).exists())]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing += [link for link in links if not (ROOT / document.parent / link).exists()]
    assert not missing


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """Functions of the package that lifting the bundled example calls."""
    out = tmp_path_factory.mktemp("traced") / "poses.npz"
    examples = Path(diffupose.__file__).parent / "examples"
    command = ["lift", examples / "keypoints.json", "--annotations", examples / "images.json", "--out", out, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", TRACE, *map(str, command)], capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def named_functions():
    text = (ROOT / "docs" / "one_keypoint.md").read_text(encoding="utf-8")
    packages = {path.stem for path in (ROOT / "diffupose").iterdir()} - {"reference", "kernels"}
    return {name for name in re.findall(r"`([a-z_]\w*(?:\.\w+)+)`", text) if name.partition(".")[0] in packages}


@requires_cpp
def test_one_keypoint_passes_through_the_functions_of_its_page(called):
    files = {name for name in named_functions() if name.endswith((".py", ".md", ".npz", ".json"))}
    elsewhere = {"ops.modulated_graph_conv.modulated_graph_conv"}  # in training
    assert not named_functions() - files - elsewhere - called


@requires_cpp
def test_the_page_names_the_public_functions(called):
    areas = ("camera.", "conditioning.", "keypoints.", "lifting.inputs.", "schedule.")
    public = {name for name in called if name.startswith(areas) and re.fullmatch(r"[a-z_.]+", name)}
    assert not {name for name in public if "._" not in name} - named_functions()
