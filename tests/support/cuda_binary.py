"""What nvcc made of the CUDA sources: the extension, and what every kernel takes of a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.compiled import locked
from support.cuda_emulation import setup_module


@dataclasses.dataclass(frozen=True)
class KernelUsage:
    """What ptxas says of one kernel for one GPU; memory in bytes."""

    file: str
    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclasses.dataclass(frozen=True)
class LaunchBounds:
    """``__launch_bounds__``: the most threads, and the least blocks that a multiprocessor must hold."""

    threads: int
    blocks: int


@functools.cache
def cuda_build():
    """Return setup.py as a module where it can build ``_cuda``, else skip the test."""
    if os.environ.get("DIFFUPOSE_BUILD") == "none":
        pytest.skip("DIFFUPOSE_BUILD=none: nothing is compiled")
    build = setup_module()
    if not build.find_compiler() or not build.find_ninja():
        pytest.skip("no C++ compiler or no ninja")
    if not build.find_nvcc():
        pytest.skip("no nvcc")
    return build


@functools.cache
def cuda_extension() -> Path:
    """Build (what changed) and return the extension."""
    build = cuda_build()
    path = build.BUILD / "checked" / f"_cuda{build.EXT_SUFFIX}"
    with locked(build.ROOT / "build" / "setup"):
        build.compile_extension("_cuda", path)
    return path


def demangle(names: list[str]) -> list[str]:
    """Return the names of kernels as C++ writes them."""
    listed = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return listed.splitlines()


@functools.cache
def kernel_usages() -> list[KernelUsage]:
    """Return what the last compilation said, of every kernel and GPU."""
    build = cuda_build()
    cuda_extension()
    found = []
    for source in build.cuda_sources():
        if source.suffix == ".cu":
            file = source.relative_to(build.CSRC).as_posix()
            log = (build.BUILD / "cuda" / f"{file}.o.log").read_text(encoding="utf-8")
            found += parse_usages(file, log)
    names = demangle([usage.name for usage in found])
    return [dataclasses.replace(usage, name=name) for usage, name in zip(found, names, strict=True)]


def serialized_products() -> list[str]:
    """Return where the last compilation said that it lets a warpgroup's products wait for each other."""
    cuda_extension()
    logs = sorted((cuda_build().BUILD / "cuda").rglob("*.log"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "wgmma" in line and "serialized" in line]


def parse_usages(file: str, log: str) -> list[KernelUsage]:
    """Return the kernels of ``nvcc --resource-usage``."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'\n"
        r".*Function properties for (?P=name)\n"
        r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)\n"
    )
    found = [
        KernelUsage(
            file,
            match["name"],
            match["architecture"],
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]),
            int(match["loads"]),
            int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", match["rest"])) else 0,
        )
        for match in pattern.finditer(log)
    ]
    assert len(found) == log.count("Compiling entry function"), f"{file}: ptxas writes this in another way now:\n{log}"
    return found


def product_loops(file: str, kernel: str, instruction: str = "HMMA") -> dict[int, list[str]]:
    """Return the loops of matrix products in the machine code of kernels for sm_90a.

    Args:
        file: A .cu file, by its path below csrc.
        kernel: What the names of the kernels contain.
        instruction: The matrix instruction.

    Returns:
        By the number of matrix instructions in a loop, the instructions among them that reach for the stack.
    """
    build = cuda_build()
    cuda_extension()
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else Path("cuobjdump")
    if not shutil.which(tool):
        pytest.skip("no cuobjdump, which Triton brings")
    command = [str(tool), "-sass", "-arch", "sm_90a", str(build.BUILD / "cuda" / f"{file}.o")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops: dict[int, list[str]] = {}
    for function in listed.split("Function : ")[1:]:
        if kernel not in function.split("\n", 1)[0]:
            continue
        code = re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", function)
        places = [i for i, line in enumerate(code) if instruction in line]
        begin = 0
        for i in range(1, len(places) + 1):
            if i == len(places) or places[i] - places[i - 1] > 100:
                among = code[places[begin] : places[i - 1]]
                loops.setdefault(i - begin, []).extend(line for line in among if re.search(r"\b(LDL|STL)\b", line))
                begin = i
    return loops


@functools.cache
def ptx_files() -> dict[str, str]:
    """Return each .cu file as PTX for sm_90a, by its path below csrc."""
    build = cuda_build()
    compiler, nvcc = build.find_compiler(), build.find_nvcc()
    build.BUILD.mkdir(parents=True, exist_ok=True)
    command = [*nvcc, "-ccbin", compiler[0], "-std=c++17", "-arch=compute_90a", "-I", str(build.CSRC), "-ptx"]
    lines = [
        "rule ptx",
        f"  command = {build.quote(command)} -MMD -MF $out.d $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    files = [source for source in build.cuda_sources() if source.suffix == ".cu"]
    targets = {file.relative_to(build.CSRC).as_posix(): file for file in files}
    lines += [f"build ptx/{name}.ptx: ptx {build.ninja_path(str(file))}" for name, file in targets.items()]
    (build.BUILD / "ptx.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with locked(build.ROOT / "build" / "setup"):
        subprocess.run([*build.find_ninja(), "-C", str(build.BUILD), "-f", "ptx.ninja"], check=True)
    return {name: (build.BUILD / "ptx" / f"{name}.ptx").read_text(encoding="utf-8") for name in targets}


def parse_bounds(ptx: str) -> dict[str, LaunchBounds | None]:
    """Return the launch bounds of the kernels of a PTX file, by their mangled names."""
    found: dict[str, LaunchBounds | None] = {}
    for match in re.finditer(r"\.entry (\w+)\(.*?\)(.*?)\{", ptx, re.DOTALL):
        name, head = match.groups()
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        if not threads:
            found[name] = None
            continue
        product = 1
        for number in threads.groups():
            product *= int(number or 1)
        found[name] = LaunchBounds(product, int(blocks[1]) if blocks else 1)
    return found


@functools.cache
def launch_bounds() -> dict[tuple[str, str], LaunchBounds | None]:
    """Return the launch bounds of every kernel, by its file and name."""
    found = {}
    for file, ptx in ptx_files().items():
        bounds = parse_bounds(ptx)
        for name, bound in zip(demangle(list(bounds)), bounds.values(), strict=True):
            found[file, name] = bound
    return found
