"""Build the extensions ``diffupose._C`` (C++) and ``diffupose._cuda``; the rest stands in ``pyproject.toml``.

The build needs pybind11, ninja and a C++17 compiler, for ``_cuda`` also nvcc, and neither torch nor the network.
``DIFFUPOSE_BUILD`` chooses:

    auto (default)  build what can be built, print one line about it, and go on without the rest
    cpu             build ``_C`` or fail
    cuda            build ``_C`` and ``_cuda`` or fail
    none            pure Python

The usual CXX, CXXFLAGS and LDFLAGS are honoured, and for ``_cuda`` NVCC, CUDA_HOME and TORCH_CUDA_ARCH_LIST.
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
# GPUs that _cuda is built for where TORCH_CUDA_ARCH_LIST does not say: the machine is not asked.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0;12.0+PTX"
OLDEST_ARCHITECTURE = 80  # that has bfloat16 and its matrix instructions
# What may stand before the compiler in CXX, which nvcc is told without it.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
# Why there is no extension, for `diffupose env`: pip shows what the build prints with -v only.
REASON_NAMES = {"_C": "_no_extension.txt", "_cuda": "_no_cuda.txt"}
NOT_WANTED = "DIFFUPOSE_BUILD={} asked for it"


def build_mode() -> str:
    """Return the value of DIFFUPOSE_BUILD, checked."""
    mode = os.environ.get("DIFFUPOSE_BUILD") or "auto"
    if mode not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"DIFFUPOSE_BUILD must be one of auto, cuda, cpu, none; got {mode!r}")
    return mode


def find_nvcc() -> list[str]:
    """Return nvcc as a command, empty if there is none."""
    if os.environ.get("NVCC"):
        try:
            command = shlex.split(os.environ["NVCC"])
        except ValueError as error:
            raise RuntimeError(f"NVCC is {os.environ['NVCC']!r}: {error}") from None
        if not command or not shutil.which(command[0]):
            raise RuntimeError(f"NVCC names {os.environ['NVCC']!r}, which is not there")
        return command
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(str(Path(folder) / "bin" / "nvcc") for folder in folders), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(([found] for found in map(shutil.which, candidates) if found), [])


def cuda_architectures(nvcc: list[str]) -> list[str]:
    """Return nvcc's flags for what TORCH_CUDA_ARCH_LIST names, such as "8.0;9.0a;10.0+PTX".

    What is older than 8.0, which the kernels need, is left out, and so is what this nvcc does not know of the default
    list; in a given one that is an error.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    try:
        asked = subprocess.run([*nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{shlex.join(nvcc)} cannot be run: {error.strerror}") from None
    known = {name.removeprefix("sm_") for name in asked.stdout.split()}
    if asked.returncode or not known:
        said = (asked.stderr or asked.stdout).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{shlex.join(nvcc)} --list-gpu-code ended with {asked.returncode} and said: {said[-1]}")
    flags = []
    for entry in filter(None, (given or CUDA_ARCHITECTURES).split(";")):
        number = entry.removesuffix("+PTX").replace(".", "")
        plain = number.rstrip("af")
        if plain.isdigit() and int(plain) < OLDEST_ARCHITECTURE:
            continue
        if plain not in known:
            if given:
                names = ", ".join(sorted(known, key=lambda name: int(name.rstrip("af"))))
                raise RuntimeError(f"TORCH_CUDA_ARCH_LIST names {entry!r}, nvcc has {names}")
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        what = f"TORCH_CUDA_ARCH_LIST, {given!r}," if given else "nvcc"
        raise RuntimeError(f"{what} has no architecture that the kernels run on: 8.0 or newer")
    return flags


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


def quote(command: list[str]) -> str:
    """Return a command for a ninja file."""
    return shlex.join(command).replace("$", "$$")


def ninja_path(name: str) -> str:
    """Return a path for a ninja file."""
    return name.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_command(compiler: list[str], *flags: str) -> list[str]:
    """Return what every C++ file is compiled with; paths are relative to BUILD."""
    import pybind11

    # pip's isolated environment has a new path each time; a link with a stable name keeps the commands equal, and
    # with them the objects. The version in the name recompiles when the headers change (-MMD skips system headers).
    headers = BUILD / f"pybind11-{pybind11.__version__}"
    headers.unlink(missing_ok=True)
    headers.symlink_to(pybind11.get_include(), target_is_directory=True)

    return [
        *compiler,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
        *["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *flags],
        # The same numbers on every machine: no reordering, and a * b + c stays two roundings where FMA exists.
        *["-fno-fast-math", "-ffp-contract=off"],
        *["-I", str(CSRC), "-isystem", headers.name, "-isystem", sysconfig.get_path("include")],
    ]


class NinjaFile:
    """A ninja file that compiles C++ sources with one command and links them with another."""

    def __init__(self, compile_with: list[str], link_with: list[str]) -> None:
        self.lines = [
            "rule compile",
            f"  command = {quote(compile_with)} $defines -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {quote(link_with)} $in {quote(shlex.split(os.environ.get('LDFLAGS', '')))} -o $out",
        ]
        self.objects: list[str] = []

    def build(self, rule: str, name: str, source: Path, *defines: str) -> None:
        """Make an object of a source."""
        self.objects.append(name)
        self.lines.append(f"build {name}: {rule} {ninja_path(str(source))}")
        if defines:
            self.lines.append(f"  defines = {quote(list(defines))}")

    def text(self, target: str) -> str:
        """Return the file, which links all objects to a target."""
        return "\n".join([*self.lines, f"build {target}: link {' '.join(self.objects)}"]) + "\n"


def hash_define() -> str:
    """Return the definition of the sources' hash, which the extension tells at run time."""
    spec = importlib.util.spec_from_file_location("_source_hash", ROOT / "diffupose" / "_source_hash.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return f'-DDIFFUPOSE_SOURCE_HASH="{module.source_hash(CSRC)}"'


def cpp_ninja_file(compiler: list[str], openmp: bool) -> str:
    """Return the ninja file of ``_C``: all .cpp files but those named *_cuda.cpp."""
    flags = ["-fopenmp"] if openmp else []
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
    file = NinjaFile(compile_command(compiler, *flags), [*compiler, *shared, *flags])

    def compile_to(name: str, source: str, *defines: str) -> None:
        file.build("compile", name, CSRC / source, *defines)

    sets = instruction_sets(compiler)
    for source in sorted(file.relative_to(CSRC).as_posix() for file in CSRC.rglob("*.cpp")):
        stem = source.removesuffix(".cpp")
        if stem.endswith("_cuda"):
            continue
        if stem.endswith("_isa"):
            for name, flags in sets.items():
                # The results are the same within one instruction set, not across them: here FMA is welcome.
                compile_to(f"{stem}.{name}.o", source, f"-DDIFFUPOSE_ISA={name}", "-ffp-contract=fast", *flags)
        elif source == "common/build_info.cpp":
            compile_to(f"{stem}.o", source, hash_define())
        else:
            compile_to(f"{stem}.o", source, *(f"-DDIFFUPOSE_WITH_{name.upper()}" for name in sets if name in X86))
    return file.text(f"_C{EXT_SUFFIX}")


def cuda_ninja_file(compiler: list[str], nvcc: list[str]) -> str:
    """Return the ninja file of ``_cuda``: the .cu files, the *_cuda.cpp files and what both extensions share."""
    # cudart is linked in: the module imports without a driver, and next to the cudart that torch brings.
    link = [*nvcc, "-ccbin", host_compiler(compiler), "-shared", "--cudart", "static", "-Xlinker", "-s"]
    file = NinjaFile(compile_command(compiler), link)
    file.lines += [
        "rule nvcc",
        # Registers and spills of every kernel go beside the object, with the messages of a compilation that fails.
        f"  command = {quote(nvcc_command(compiler, nvcc))} --resource-usage -MMD -MF $out.d -c $in -o $out "
        "2> $out.log || (cat $out.log >&2; false)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for source in cuda_sources():
        rule = "nvcc" if source.suffix == ".cu" else "compile"
        name = f"cuda/{source.relative_to(CSRC).as_posix()}.o"
        file.build(rule, name, source, *([hash_define()] if source.stem == "build_info" else []))
    return file.text(f"_cuda{EXT_SUFFIX}")


def host_compiler(compiler: list[str]) -> str:
    """Return the program of a compiler's command, for nvcc."""
    return next((word for word in compiler if Path(word).name not in LAUNCHERS), compiler[0])


def cuda_sources() -> list[Path]:
    """Return the sources of ``_cuda``."""
    return sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*_cuda.cpp"), CSRC / "common" / "build_info.cpp"])


def nvcc_command(compiler: list[str], nvcc: list[str]) -> list[str]:
    """Return what .cu files are compiled with. IEEE division and square roots: no fast math."""
    architectures = cuda_architectures(nvcc)
    # The host asks for Hopper's kernel only where there is machine code with its matrix instructions.
    defines = ["-DDIFFUPOSE_HAS_SM90A"] if any(flag.endswith("sm_90a") for flag in architectures) else []
    return [
        *[*nvcc, "-ccbin", host_compiler(compiler), "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"],
        *["-Werror", "all-warnings", "-Xcompiler", "-Wall", "--threads", "2"],
        *[*architectures, *defines, "-I", str(CSRC)],
    ]


def emulation_ninja_file(compiler: list[str], target: str) -> str:
    """Return the ninja file of ``_cuda`` for a machine without a GPU: the .cu files as C++, threads emulated."""
    folder = ROOT / "tests" / "cpp" / "cuda_emulation"
    file = NinjaFile([*compile_command(compiler), "-I", str(folder)], [*compiler, "-shared"])
    for source in [*cuda_sources(), *sorted(folder.glob("*.cpp"))]:
        name = f"emulation/{source.relative_to(ROOT).as_posix()}.o"
        defines = ["-x", "c++", "-Wno-unknown-pragmas"] if source.suffix == ".cu" else []
        file.build("compile", name, source, *defines, *([hash_define()] if source.stem == "build_info" else []))
    return file.text(target)


def compile_extension(name: str, target: Path) -> str:
    """Compile an extension to ``target`` and return what was built; raise RuntimeError with the reason if it cannot be.

    Args:
        name: ``"_C"``, ``"_cuda"`` or ``"_cuda_emulated"``.
        target: Where the module goes.
    """
    compiler, ninja = find_compiler(), find_ninja()
    if not compiler:
        raise RuntimeError("no C++ compiler found (install one, or set CXX)")
    if not ninja:
        raise RuntimeError("ninja not found (pip install ninja)")
    if not importlib.util.find_spec("pybind11"):
        raise RuntimeError("pybind11 not found (pip install pybind11)")
    BUILD.mkdir(parents=True, exist_ok=True)
    built = name
    if name == "_C":
        openmp = accepts(compiler, "-fopenmp")
        text = cpp_ninja_file(compiler, openmp)
        built = f"_C (C++, {'with' if openmp else 'without'} OpenMP)"
    elif name == "_cuda":
        nvcc = find_nvcc()
        if not nvcc:
            raise RuntimeError("no nvcc found (install the CUDA toolkit, or set NVCC or CUDA_HOME)")
        text = cuda_ninja_file(compiler, nvcc)
        built = "_cuda"
    else:
        text = emulation_ninja_file(compiler, f"{name}{EXT_SUFFIX}")
    (BUILD / f"{name}.ninja").write_text(text)
    if subprocess.run([*ninja, "-C", str(BUILD), "-f", f"{name}.ninja"], check=False).returncode:
        language = "C++" if name == "_C" else "CUDA"
        raise RuntimeError(f"the {language} sources did not compile (pip install -v shows the messages)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(BUILD / f"{name}{EXT_SUFFIX}", target)
    return built


def remove_old_extensions() -> None:
    """Remove the extensions of an earlier in-place build, so that a build that makes none leaves none."""
    for name, reason in REASON_NAMES.items():
        (ROOT / "diffupose" / f"{name}{EXT_SUFFIX}").unlink(missing_ok=True)
        (ROOT / "diffupose" / reason).unlink(missing_ok=True)


def record_reason(package: Path, name: str, reason: str) -> None:
    """Leave in a built or in-place package why it has no extension of that name."""
    package.mkdir(parents=True, exist_ok=True)
    (package / REASON_NAMES[name]).write_text(reason + "\n", encoding="utf-8")


class BuildPackages(build_py):
    """Copy the Python files, after removing what an earlier build left: setuptools would pack it again."""

    def run(self) -> None:
        if self.editable_mode:
            remove_old_extensions()
        elif ROOT / "build" in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if MODE == "none":
            print("diffupose: built nothing, as DIFFUPOSE_BUILD=none asks")
            record_unwanted((ROOT if self.editable_mode else Path(self.build_lib)) / "diffupose")
        super().run()


def record_unwanted(package: Path) -> None:
    """Leave in a package why it lacks the extensions that DIFFUPOSE_BUILD does not ask for."""
    for name in REASON_NAMES:
        if name not in WANTED:
            record_reason(package, name, NOT_WANTED.format(MODE))


class BuildExtension(build_ext):
    """Compile with ninja instead of one file after the other."""

    def run(self) -> None:
        if self.inplace:
            remove_old_extensions()
            record_unwanted(ROOT / "diffupose")
        elif self.extensions:
            record_unwanted(Path(self.get_ext_fullpath("diffupose._C")).resolve().parent)
        # setuptools builds elsewhere even then, and copies what it knows of: the extension.
        self.in_place = ROOT / "diffupose" if self.inplace else None
        self.built, self.missing = [], []
        super().run()
        if self.extensions:
            built = f"built {', '.join(self.built)}" if self.built else "built nothing, the PyTorch code is used"
            print(f"diffupose: {built}" + (f"; not built: {', '.join(self.missing)}" if self.missing else ""))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        name = ext.name.removeprefix("diffupose.")
        try:
            self.built.append(compile_extension(name, target))
        except RuntimeError as error:
            if not ext.optional:
                raise SystemExit(f"DIFFUPOSE_BUILD={MODE}: {error}") from None
            record_reason(self.in_place or target.parent, name, str(error))
            self.missing.append(f"{name} ({error})")


MODE = build_mode()
WANTED = {"auto": ("_C", "_cuda"), "cuda": ("_C", "_cuda"), "cpu": ("_C",), "none": ()}[MODE]
if __name__ == "__main__":  # tests import what stands above
    setup(
        packages=[*find_packages(include=["diffupose", "diffupose.*"]), "diffupose.kernels"],
        package_dir={"diffupose.kernels": "kernels"},
        ext_modules=[Extension(f"diffupose.{name}", [], optional=MODE == "auto") for name in WANTED],
        cmdclass={"build_py": BuildPackages, "build_ext": BuildExtension},
    )
