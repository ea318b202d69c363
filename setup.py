"""Build the extensions ``diffupose._C`` (C++) and ``diffupose._cuda``; ``pyproject.toml`` holds the rest.

The build needs pybind11, ninja and a C++17 compiler, for ``_cuda`` also nvcc. It needs neither torch nor the network.
``DIFFUPOSE_BUILD`` chooses:

    auto (default)  build what can be built, print one line about it, and go on without the rest
    cpu             build ``_C`` or fail
    cuda            build ``_C`` and ``_cuda`` or fail
    none            pure Python

CXX, CXXFLAGS and LDFLAGS work as usual. ``_cuda`` also reads NVCC, CUDA_HOME and TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
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
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import cuda_architectures, find_compiler, find_ninja, find_nvcc, host_compiler  # noqa: E402

CSRC = ROOT / "csrc"
# One build folder for each interpreter and platform. It is kept between builds: ninja recompiles only what changed.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Files named *_isa.cpp are compiled once for each instruction set whose flags the compiler takes.
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
X86["avx512_bf16"] = [*X86["avx512"], "-mavx512bf16"]
# Why there is no extension, for `diffupose env`: pip shows what a build prints with -v only.
REASON_NAMES = {"_C": "_no_extension.txt", "_cuda": "_no_cuda.txt"}
WANTED = {"auto": ("_C", "_cuda"), "cuda": ("_C", "_cuda"), "cpu": ("_C",), "none": ()}
COMPILE = " $flags -MMD -MF $out.d -c $in -o $out"
MODE = os.environ.get("DIFFUPOSE_BUILD") or "auto"
if MODE not in WANTED:
    raise SystemExit(f"DIFFUPOSE_BUILD must be one of {', '.join(WANTED)}; got {MODE!r}")


def accepts(compiler: list[str], *flags: str) -> bool:
    """Return whether a program compiles and links with these flags; Apple's clang, for example, has no -fopenmp."""
    command = [*compiler, *flags, "-x", "c++", "-", "-o", str(BUILD / "try.out")]
    return subprocess.run(command, input=b"int main() {}", capture_output=True, check=False).returncode == 0


def quote(command: list[str]) -> str:
    """Return a command for a ninja file."""
    return shlex.join(command).replace("$", "$$")


def ninja_path(name: str) -> str:
    """Return a path for a ninja file."""
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_command(compiler: list[str], *flags: str) -> str:
    """Return the command that compiles a C++ file, for a ninja file; paths are relative to BUILD."""
    import pybind11

    # pip's isolated environment has a new path each time. A link with a stable name keeps commands and objects equal.
    # The version in the name recompiles when the headers change, since -MMD skips system headers.
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    headers.unlink(missing_ok=True)
    headers.symlink_to(pybind11.get_include(), target_is_directory=True)
    given = shlex.split(os.environ.get("CXXFLAGS", ""))
    language = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *flags]
    # The same numbers on every machine: no reordering, and a * b + c stays two roundings where FMA exists.
    numbers = ["-fno-fast-math", "-ffp-contract=off", "-I", str(CSRC)]
    system = ["-isystem", headers.name, "-isystem", sysconfig.get_path("include")]
    return quote([*compiler, *given, *language, *numbers, *system]) + COMPILE


def cuda_sources() -> list[Path]:
    """Return the sources of ``_cuda``: the .cu files, the *_cuda.cpp files and one that both extensions share."""
    return sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*_cuda.cpp"), CSRC / "common" / "build_info.cpp"])


# How an extension is made: commands that compile by the name of their rule, objects with source and flags, how to link.
Parts = tuple[dict[str, str], dict[str, tuple[Path, list[str]]], list[str]]


def cpp_parts(compiler: list[str]) -> Parts:
    """Return how ``_C`` is made: of all .cpp files but those named *_cuda.cpp."""
    openmp = ["-fopenmp"] if accepts(compiler, "-fopenmp") else []
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    sets = {name: flags for name, flags in X86.items() if accepts(compiler, *flags)}
    objects = {}
    for source in sorted(source for source in CSRC.rglob("*.cpp") if not source.stem.endswith("_cuda")):
        stem = source.relative_to(CSRC).with_suffix("").as_posix()
        if not stem.endswith("_isa"):
            objects[f"{stem}.o"] = source, [f"-DDIFFUPOSE_WITH_{name.upper()}" for name in sets]
            continue
        for name, flags in {"portable": [], **sets}.items():
            # The results are the same within one instruction set, not across them: here FMA is welcome.
            objects[f"{stem}.{name}.o"] = source, [f"-DDIFFUPOSE_ISA={name}", "-ffp-contract=fast", *flags]
    return {"compile": compile_command(compiler, *openmp)}, objects, [*compiler, *shared, *openmp]


def cuda_parts(compiler: list[str]) -> Parts:
    """Return how ``_cuda`` is made. Division and square roots follow IEEE 754: no fast math."""
    if not (nvcc := find_nvcc()):
        raise RuntimeError("no nvcc found (install the CUDA toolkit, or set NVCC or CUDA_HOME)")
    architectures = cuda_architectures(nvcc)
    nvcc += ["-ccbin", host_compiler(compiler)]
    # The host chooses Hopper's kernel only if there is machine code with Hopper's matrix instructions.
    defines = ["-DDIFFUPOSE_HAS_SM90A"] if any(flag.endswith("sm_90a") for flag in architectures) else []
    language = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-I", str(CSRC), "--threads", "2"]
    checks = ["-Werror", "all-warnings", "-Xcompiler", "-Wall", "--resource-usage"]
    # Each kernel's registers and spills go to a log beside the object. If the compilation fails, the log is shown.
    kernels = quote([*nvcc, *language, *checks, *architectures, *defines]) + COMPILE
    rules = {"compile": compile_command(compiler), "nvcc": f"{kernels} 2> $out.log || (cat $out.log >&2; false)"}
    objects = {f"cuda/{source.relative_to(CSRC).as_posix()}.o": (source, []) for source in cuda_sources()}
    # cudart is linked in: the module imports without a driver, and next to the cudart that torch brings.
    return rules, objects, [*nvcc, "-shared", "--cudart", "static", "-Xlinker", "-s"]


def emulation_parts(compiler: list[str]) -> Parts:
    """Return how ``_cuda`` is made for a machine without a GPU: the .cu files as C++, threads emulated."""
    folder = ROOT / "tests" / "cpp" / "cuda_emulation"
    sources = [*cuda_sources(), *folder.glob("*.cpp")]
    objects = {f"emulation/{source.relative_to(ROOT).as_posix()}.o": (source, []) for source in sources}
    return {"compile": compile_command(compiler, "-I", str(folder))}, objects, [*compiler, "-shared"]


PARTS = {"_C": cpp_parts, "_cuda": cuda_parts, "_cuda_emulated": emulation_parts}


def ninja_file(name: str, parts: Parts) -> str:
    """Return the content of the ninja file that makes an extension."""
    rules, objects, link = parts
    lines = [f"rule link\n  command = {quote(link)} $in {quote(shlex.split(os.environ.get('LDFLAGS', '')))} -o $out"]
    for rule, command in rules.items():
        lines.append(f"rule {rule}\n  command = {command}\n  depfile = $out.d\n  deps = gcc")
    for target, (source, flags) in objects.items():
        rule = "nvcc" if source.suffix == ".cu" and "nvcc" in rules else "compile"
        if source.suffix == ".cu" and rule == "compile":
            flags = ["-x", "c++", "-Wno-unknown-pragmas"]
        if source.stem == "build_info":
            source_hash = runpy.run_path(str(ROOT / "diffupose" / "_source_hash.py"))["source_hash"](CSRC)
            flags = [*flags, f'-DDIFFUPOSE_SOURCE_HASH="{source_hash}"']
        lines.append(f"build {target}: {rule} {ninja_path(str(source))}\n  flags = {quote(flags)}")
    return "\n".join([*lines, f"build {name}{EXT_SUFFIX}: link {' '.join(objects)}", ""])


def compile_extension(name: str, target: Path) -> str:
    """Compile an extension to ``target`` and return what was built; raise RuntimeError if it cannot be, and why."""
    compiler, ninja = find_compiler(), find_ninja()
    if not compiler:
        raise RuntimeError("no C++ compiler found (install one, or set CXX)")
    if not ninja:
        raise RuntimeError("ninja not found (pip install ninja)")
    if not importlib.util.find_spec("pybind11"):
        raise RuntimeError("pybind11 not found (pip install pybind11)")
    BUILD.mkdir(parents=True, exist_ok=True)
    text = ninja_file(name, PARTS[name](compiler))
    (BUILD / f"{name}.ninja").write_text(text)
    if subprocess.run([*ninja, "-C", str(BUILD), "-f", f"{name}.ninja"], check=False).returncode:
        language = "C++" if name == "_C" else "CUDA"
        raise RuntimeError(f"the {language} sources did not compile (pip install -v shows the messages)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BUILD / f"{name}{EXT_SUFFIX}", target)
    return f"_C (C++, {'with' if '-fopenmp' in text else 'without'} OpenMP)" if name == "_C" else name


def prepare(package: Path) -> None:
    """Remove the extensions of an earlier build from a package, and write there which ones are not wanted."""
    package.mkdir(parents=True, exist_ok=True)
    for name, reason in REASON_NAMES.items():
        (package / f"{name}{EXT_SUFFIX}").unlink(missing_ok=True)
        (package / reason).unlink(missing_ok=True)
        if name not in WANTED[MODE]:
            (package / reason).write_text(f"DIFFUPOSE_BUILD={MODE} asked for it\n")


class BuildPackages(build_py):
    """Copy the Python files, after removing what an earlier build left: setuptools would pack it again."""

    def run(self) -> None:
        if not self.editable_mode and ROOT / "build" in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if self.editable_mode or MODE == "none":
            prepare((ROOT if self.editable_mode else Path(self.build_lib)) / "diffupose")
        if MODE == "none":
            print("diffupose: built nothing, as DIFFUPOSE_BUILD=none asks")
        super().run()


class BuildExtension(build_ext):
    """Compile with ninja instead of one file after the other."""

    def run(self) -> None:
        # Even in place setuptools builds elsewhere, and then copies what it knows of: the extensions.
        self.target = ROOT / "diffupose" if self.inplace else Path(self.get_ext_fullpath("diffupose._C")).parent
        if self.inplace or self.extensions:
            prepare(self.target)
        self.built, self.missing = [], []
        super().run()
        if self.extensions:
            built = f"built {', '.join(self.built)}" if self.built else "built nothing, the PyTorch code is used"
            print(f"diffupose: {built}" + (f"; not built: {', '.join(self.missing)}" if self.missing else ""))

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.removeprefix("diffupose.")
        try:
            self.built.append(compile_extension(name, Path(self.get_ext_fullpath(ext.name)).resolve()))
        except RuntimeError as error:
            if not ext.optional:
                raise SystemExit(f"DIFFUPOSE_BUILD={MODE}: {error}") from None
            (self.target / REASON_NAMES[name]).write_text(f"{error}\n", encoding="utf-8")
            self.missing.append(f"{name} ({error})")


if __name__ == "__main__":  # tests import what stands above
    setup(
        packages=[*find_packages(include=["diffupose", "diffupose.*"]), "diffupose.kernels"],
        package_dir={"diffupose.kernels": "kernels"},
        ext_modules=[Extension(f"diffupose.{name}", [], optional=MODE == "auto") for name in WANTED[MODE]],
        cmdclass={"build_py": BuildPackages, "build_ext": BuildExtension},
    )
