"""What nvcc makes of the CUDA sources: no spills, no more registers than there are, and what is linked in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from support.cuda_binary import (
    KernelUsage,
    LaunchBounds,
    cuda_build,
    cuda_extension,
    demangle,
    kernel_usages,
    launch_bounds,
    parse_bounds,
    parse_usages,
    product_loops,
    ptx_files,
    serialized_products,
)

REGISTERS_OF_A_MULTIPROCESSOR = 65536
STATIC_SHARED_LIMIT = 48 << 10
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90a'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 79.093 ms
"""
PTX = """.visible .entry _Z1kPf(
        .param .u64 _Z1kPf_param_0
)
.maxntid 64, 2, 1
.minnctapersm 3
{ ret; }
.visible .entry _Z1lPf(
        .param .u64 _Z1lPf_param_0
)
{ ret; }
"""


def registers_of(usage: KernelUsage, bounds: LaunchBounds) -> int:
    """Registers are given to warps, eight a thread at a time."""
    per_warp = -(-usage.registers // 8) * 8 * 32
    return per_warp * -(-bounds.threads // 32) * bounds.blocks


def named(usages: list[KernelUsage]) -> str:
    return "\n".join(map(str, usages))


def test_log_is_read():
    assert parse_usages("k.cu", LOG) == [KernelUsage("k.cu", "_Z1kPf", "90a", 31, 8, 16, 24, 512)]
    with pytest.raises(AssertionError, match="in another way"):
        parse_usages("k.cu", LOG.replace("spill", "spilled"))


def test_ptx_is_read():
    assert parse_bounds(PTX) == {"_Z1kPf": LaunchBounds(128, 3), "_Z1lPf": None}


def test_registers_are_counted_by_warps():
    usage = KernelUsage("k.cu", "k", "90a", 33, 0, 0, 0, 0)
    assert registers_of(usage, LaunchBounds(100, 2)) == 40 * 128 * 2


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_gpu():
    """Those of data centres, unless TORCH_CUDA_ARCH_LIST names others; and what PTX has, the logs have."""
    usages = kernel_usages()
    architectures = {usage.architecture for usage in usages}
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert architectures >= {"80", "90a", "100"}
    everything = {(*kernel, architecture) for kernel in launch_bounds() for architecture in architectures}
    assert everything
    assert {(usage.file, usage.name, usage.architecture) for usage in usages} == everything


def is_persistent(usage: KernelUsage) -> bool:
    return "::sample_kernel<" in usage.name or "::wgmma_kernel<" in usage.name


@pytest.mark.slow
def test_no_kernel_spills():
    """The persistent kernels alone may: they take all registers there are, and count their steps in memory."""
    spilling = [usage for usage in kernel_usages() if usage.spill_stores or usage.spill_loads]
    assert not [usage for usage in spilling if not is_persistent(usage)], named(spilling)
    assert all(usage.spill_stores <= 64 and usage.spill_loads <= 64 for usage in spilling), named(spilling)


@pytest.mark.slow
def test_the_persistent_kernel_multiplies_out_of_registers():
    """Between the first and the last matrix instruction of a loop nothing is put aside, and there are all of them."""
    loops = product_loops("engine/cuda/persistent/persistent_mma.cu", "sample_kernel")
    # Two blocks of columns of every pair of joints: of a linear layer, and of both products of a graph convolution.
    assert sorted(loops) == sorted(2 * products * pairs for products in (1, 2) for pairs in (8, 9))
    assert not any(loops.values()), loops


EARLY = {"product_kernel", "task_kernel", "step_kernel"}


@pytest.mark.slow
def test_kernels_that_start_early_wait():
    """Before they write anything; what they do for it is in PTX by its name."""
    early = set()
    for ptx in ptx_files().values():
        for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL):
            before, wait, _ = body.partition("griddepcontrol.wait;")
            assert bool(wait) == ("griddepcontrol.launch_dependents;" in body), name
            if wait:
                early.add(re.search(r"::(\w+)<", demangle([name])[0])[1])
                assert not re.search(r"\b(st|red|atom)\.(global|volatile)", before), name
    assert early == EARLY


@pytest.mark.slow
def test_hoppers_kernel_multiplies_out_of_registers():
    """As above: a round of eight steps of one product or two, the tensor cores waiting for none of them."""
    loops = product_loops("engine/cuda/persistent/persistent_wgmma.cu", "wgmma_kernel", "HGMMA")
    assert sorted(loops) == [8, 16]
    assert not any(loops.values()), loops
    assert not serialized_products()


@pytest.mark.slow
def test_no_kernel_needs_a_stack():
    """An array that is indexed at run time lies in memory, without being called a spill; of the others see above."""
    stacked = [usage for usage in kernel_usages() if usage.stack > (32 if is_persistent(usage) else 0)]
    assert not stacked, named(stacked)


@pytest.mark.slow
def test_every_kernel_can_be_launched():
    """Within its launch bounds, which every kernel says."""
    bounds = launch_bounds()
    assert not [kernel for kernel, bound in bounds.items() if bound is None]
    demanding = [
        usage
        for usage in kernel_usages()
        if registers_of(usage, bounds[usage.file, usage.name]) > REGISTERS_OF_A_MULTIPROCESSOR
        or usage.shared > STATIC_SHARED_LIMIT
    ]
    assert not demanding, named(demanding)


@pytest.mark.slow
def test_cuda_runtime_is_linked_in():
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    listed = subprocess.run(["readelf", "-d", str(cuda_extension())], capture_output=True, text=True, check=True).stdout
    needed = [line for line in listed.splitlines() if "(NEEDED)" in line]
    assert needed
    assert not [line for line in needed if "libcuda" in line or "libnv" in line]


@pytest.mark.slow
def test_imports_without_a_driver():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cuda", {str(cuda_extension())!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.driver_version()
print(module.runtime_version() // 1000)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    release = subprocess.run(
        [*cuda_build().find_nvcc(), "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert f"release {done.stdout.strip()}." in release
