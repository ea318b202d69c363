"""Compile the Triton kernels of real calls for GPUs that are not there, and say what each takes of the machine.

    python compile_triton.py CALLS ARCH...

CALLS is a Python file with a list ``CALLS`` of (name, function): the kernels that the functions launch, on CPU tensors,
are compiled instead. One JSON line is printed per kernel and architecture.
"""

from __future__ import annotations

import itertools
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffupose.kernels import _launch

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
          torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def source_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Return what Triton would compile for a call, and with which options: types, constants and divisibility by 16."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False)) | {name: options[name] for name in names if name in options}
    assert values.keys() == set(names), f"{kernel.__name__} lacks {set(names) - values.keys()}"
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value, constant = values[name], kernel.params[index].is_constexpr
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif constant or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    compiler_options = {name: value for name, value in options.items() if name not in names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), compiler_options


def resources(compiled: Any) -> dict[str, int]:
    """Return registers, stack, local and shared bytes as the cubin states them, and what its code and PTX contain.

    ``spills`` counts the instructions that read or write the stack; ``f64`` those of 64-bit arithmetic, ``approx``
    those of the hardware's inexact functions.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        found = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", _dump("--dump-resource-usage", file.name)))
        assert len(found) == 4, found
        # A stack need not hold registers: the code says what it is for.
        spills = len(re.findall(r"\b(?:STL|LDL)\b", _dump("--dump-sass", file.name))) if int(found["STACK"]) else 0
    ptx = compiled.asm["ptx"]
    return {name.lower(): int(value) for name, value in found.items()} | {
        "spills": spills,
        "dynamic_shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "f64": len(re.findall(r"\.f64\b", ptx)),
        "approx": len(re.findall(r"\b(?:lg2|ex2|sin|cos|sqrt)\.approx", ptx)),
    }


def _dump(option: str, path: str) -> str:
    text = subprocess.run([_CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
    assert option != "--dump-sass" or "EXIT" in text, "no code was shown"
    return text


def main() -> None:
    once = "--once" in sys.argv  # a kernel in the variant that comes first
    calls, *architectures = [argument for argument in sys.argv[1:] if argument != "--once"]
    recorded: list[tuple[Any, ...]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert 0 not in grid, "the call must launch something"
        recorded.append((kernel, arguments, options))

    _launch.launch = record
    seen = set()
    for architecture, (name, call) in itertools.product(map(int, architectures), runpy.run_path(calls)["CALLS"]):
        _launch.generation_of = lambda _, generation=architecture // 10: generation
        recorded.clear()
        call()
        assert recorded, f"{name} launches nothing"
        for kernel, arguments, options in recorded:
            source, compiler_options = source_of(kernel, arguments, options)
            variant = () if once else (str(source.signature), str(source.constants), str(source.attrs))
            key = (architecture, kernel.__name__, *variant)
            if key in seen:
                continue
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=compiler_options)
            row = {"call": name, "kernel": kernel.__name__, "arch": architecture} | resources(compiled)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
