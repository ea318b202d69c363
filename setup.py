"""Build the C++ extension ``diffupose._C``; everything declarative stands in ``pyproject.toml``.

The build needs pybind11, ninja and a C++17 compiler, and neither torch nor the network. ``DIFFUPOSE_BUILD`` chooses:

    auto (default)  build what can be built, print one line about it, and go on without the rest
    cpu             build ``_C`` or fail
    cuda            build ``_C`` and the CUDA extension or fail (this version has no CUDA sources, so it fails)
    none            pure Python

The usual CXX, CXXFLAGS and LDFLAGS are honoured.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# One build folder per interpreter and platform, kept between builds: ninja recompiles only what changed.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Instruction sets by how a file named *_isa.cpp is compiled for them; where the compiler takes the flags, on x86-64.
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
X86["avx512_bf16"] = [*X86["avx512"], "-mavx512bf16"]
# Why there is no extension, for `diffupose env`: pip shows what the build prints with -v only.
REASON_NAME = "_no_extension.txt"
NOT_WANTED = "DIFFUPOSE_BUILD=none asked for it"
NO_CUDA = "this version has no CUDA sources"


def build_mode() -> str:
    """Return the value of DIFFUPOSE_BUILD, checked."""
    mode = os.environ.get("DIFFUPOSE_BUILD") or "auto"
    if mode not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"DIFFUPOSE_BUILD must be one of auto, cuda, cpu, none; got {mode!r}")
    if mode == "cuda":
        raise SystemExit(f"DIFFUPOSE_BUILD=cuda: {NO_CUDA}; use auto, cpu or none")
    return mode


def find_compiler() -> list[str]:
    """Return the C++ compiler as a command, empty if there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = (shlex.split(candidate) for candidate in candidates)
    return next((command for command in commands if command and shutil.which(command[0])), [])


def find_ninja() -> list[str]:
    """Return ninja as a command, empty if there is none; the Python package first, since PATH may lack its script."""
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    path = shutil.which("ninja")
    return [path] if path else []


def accepts(compiler: list[str], *flags: str) -> bool:
    """Return whether a program compiles and links with these flags (Apple's clang, for one, has no -fopenmp)."""
    source, binary = BUILD / "try.cpp", BUILD / "try.out"
    source.write_text("int main() { return 0; }\n")
    command = [*compiler, *flags, str(source), "-o", str(binary)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def instruction_sets(compiler: list[str]) -> dict[str, list[str]]:
    """Return the flags of every instruction set that files named *_isa.cpp are compiled for."""
    return {"portable": []} | {name: flags for name, flags in X86.items() if accepts(compiler, *flags)}


def ninja_file(compiler: list[str], openmp: bool) -> str:
    """Return the text of build.ninja; paths in it are relative to BUILD."""
    import pybind11

    # pip's isolated environment has a new path each time; a link with a stable name keeps the commands equal, and
    # with them the objects. The version in the name recompiles when the headers change (-MMD skips system headers).
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    headers.unlink(missing_ok=True)
    headers.symlink_to(pybind11.get_include(), target_is_directory=True)

    spec = importlib.util.spec_from_file_location("_source_hash", ROOT / "diffupose" / "_source_hash.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    openmp_flag = ["-fopenmp"] if openmp else []
    compile_command = [
        *compiler,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
        *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *openmp_flag],
        # The same numbers on every machine: no reordering, and a * b + c stays two roundings where FMA exists.
        *["-fno-fast-math", "-ffp-contract=off"],
        *["-I", str(CSRC), "-isystem", headers.name, "-isystem", sysconfig.get_path("include")],
    ]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    link_command = [*compiler, *shared, *openmp_flag]
    link_flags = shlex.split(os.environ.get("LDFLAGS", ""))

    def quote(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    def path(name: str) -> str:
        return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {quote(compile_command)} $defines -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {quote(link_command)} $in {quote(link_flags)} -o $out",
    ]
    objects = []

    def compile_to(name: str, source: str, *defines: str) -> None:
        objects.append(name)
        lines.append(f"build {name}: compile {path(str(CSRC / source))}")
        if defines:
            lines.append(f"  defines = {quote(list(defines))}")

    sets = instruction_sets(compiler)
    for source in sorted(file.relative_to(CSRC).as_posix() for file in CSRC.rglob("*.cpp")):
        stem = source.removesuffix(".cpp")
        if stem.endswith("_isa"):
            for name, flags in sets.items():
                # The results are the same within one instruction set, not across them: here FMA is welcome.
                compile_to(f"{stem}.{name}.o", source, f"-DDIFFUPOSE_ISA={name}", "-ffp-contract=fast", *flags)
        elif source == "common/build_info.cpp":
            compile_to(f"{stem}.o", source, f'-DDIFFUPOSE_SOURCE_HASH="{module.source_hash(CSRC)}"')
        else:
            compile_to(f"{stem}.o", source, *(f"-DDIFFUPOSE_WITH_{name.upper()}" for name in sets if name in X86))
    lines.append(f"build _C{EXT_SUFFIX}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def compile_extension(target: Path) -> str:
    """Compile ``_C`` to ``target`` and return what was built; raise RuntimeError with the reason if it cannot be."""
    compiler, ninja = find_compiler(), find_ninja()
    if not compiler:
        raise RuntimeError("no C++ compiler found (install one, or set CXX)")
    if not ninja:
        raise RuntimeError("ninja not found (pip install ninja)")
    if not importlib.util.find_spec("pybind11"):
        raise RuntimeError("pybind11 not found (pip install pybind11)")
    BUILD.mkdir(parents=True, exist_ok=True)
    openmp = accepts(compiler, "-fopenmp")
    (BUILD / "build.ninja").write_text(ninja_file(compiler, openmp))
    if subprocess.run([*ninja, "-C", str(BUILD)], check=False).returncode:
        raise RuntimeError("the C++ sources did not compile (pip install -v shows the messages)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BUILD / f"_C{EXT_SUFFIX}", target)
    return f"_C (C++, {'with' if openmp else 'without'} OpenMP)"


def remove_old_extension() -> None:
    """Remove the extension of an earlier in-place build, so that a build that makes none leaves none."""
    for name in (f"_C{EXT_SUFFIX}", REASON_NAME):
        (ROOT / "diffupose" / name).unlink(missing_ok=True)


def record_reason(package: Path, reason: str) -> None:
    """Leave in a built or in-place package why it has no extension."""
    package.mkdir(parents=True, exist_ok=True)
    (package / REASON_NAME).write_text(reason + "\n", encoding="utf-8")


class BuildPackages(build_py):
    """Copy the Python files, after removing what an earlier build left: setuptools would pack it again."""

    def run(self) -> None:
        if self.editable_mode:
            remove_old_extension()
        elif ROOT / "build" in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if MODE == "none":
            print("diffupose: built nothing, as DIFFUPOSE_BUILD=none asks")
            package = (ROOT if self.editable_mode else Path(self.build_lib)) / "diffupose"
            record_reason(package, NOT_WANTED)
        super().run()


class BuildExtension(build_ext):
    """Compile with ninja instead of one file after the other."""

    def run(self) -> None:
        if self.inplace:
            remove_old_extension()
            if MODE == "none":
                record_reason(ROOT / "diffupose", NOT_WANTED)
        # setuptools builds elsewhere even then, and copies what it knows of: the extension.
        self.in_place = ROOT / "diffupose" if self.inplace else None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            built = compile_extension(target)
        except RuntimeError as error:
            if not ext.optional:
                raise SystemExit(f"DIFFUPOSE_BUILD={MODE}: {error}") from None
            record_reason(self.in_place or target.parent, str(error))
            print(f"diffupose: built nothing, the PyTorch code is used; not built: _C ({error}), _cuda ({NO_CUDA})")
        else:
            print(f"diffupose: built {built}; not built: _cuda ({NO_CUDA})")


MODE = build_mode()
setup(
    packages=[*find_packages(include=["diffupose", "diffupose.*"]), "diffupose.kernels"],
    package_dir={"diffupose.kernels": "kernels"},
    ext_modules=[] if MODE == "none" else [Extension("diffupose._C", [], optional=MODE == "auto")],
    cmdclass={"build_py": BuildPackages, "build_ext": BuildExtension},
)
