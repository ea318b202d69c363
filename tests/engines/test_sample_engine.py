"""The reverse process in the C++ engine: against the reference, the same bits everywhere, and interruptible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support.plain_program import run_program, through_bfloat16
from support.random_denoisers import denoiser_config, in_float64, random_denoiser
from support.sweeps import sweep
from support.tiny_lifters import people, tiny_lifter

from diffupose.engines.layer_program import LayerProgram, Linear
from diffupose.engines.programs import layer_program
from diffupose.ops import INITIAL_NOISE_STEP, PackedDenoiser, philox_normal, sample
from diffupose.reference.reverse_step import reverse_step
from diffupose.schedule import NoiseSchedule, StepTable, step_table
from diffupose.testing import requires_cpp

pytestmark = requires_cpp

SMALL = {
    "paper": denoiser_config("paper", hidden_dim=32, num_layers=1),
    "base": denoiser_config("base", hidden_dim=24, num_layers=1, num_heads=4),
}
ERROR = 0.05 + np.random.default_rng(3).random((40, 17, 3))  # of the prediction, per timestep, joint and axis
SAMPLERS = {
    "ddpm": {"sampler": "ddpm"},
    "ddim": {"sampler": "ddim"},
    "ddim with eta": {"sampler": "ddim", "eta": 0.7},
    "dpm++": {"sampler": "dpm++"},
    "ddpm analytic": {"sampler": "ddpm", "prediction_error": ERROR},
    "ddim analytic": {"sampler": "ddim", "prediction_error": ERROR, "timestep_spacing": "quadratic"},
}


def table_of(name, steps, prediction_type):
    return step_table(NoiseSchedule(40), steps, prediction_type=prediction_type, **SAMPLERS[name])


def conditions(config, count):
    return torch.randn(count, int(config.skeleton[-2:]), config.num_condition_channels)


def first_steps(table, count):
    """The table of the first steps: what the engine returns is then x_t in the middle of the chain."""
    scale = table.noise_scale
    return StepTable(table.coefficients[:count], table.timesteps[:count], None if scale is None else scale[:count])


# --- Against the reference ------------------------------------------------------------------------------------------


IDS = {"frame_ids": torch.tensor([7, -2]), "hypothesis_ids": torch.tensor([5, 0, 9])}


def noise_of(step):
    return philox_normal(11, IDS["frame_ids"], IDS["hypothesis_ids"], step, 51).view(2, 3, 17, 3)


def states_of(packed, inputs, table, clip):
    """The states x_T, ... x_0 ``[B, H, J, 3]`` of the engine's chain."""
    prefixes = (first_steps(table, count) for count in range(1, table.num_inference_steps + 1))
    run = partial(sample, packed, inputs, seed=11, clip_sample_range=clip, **IDS)
    return [noise_of(INITIAL_NOISE_STEP), *(run(prefix) for prefix in prefixes)]


def reference_steps(network, states, inputs, table, clip):
    """What each step of the reference makes of the engine's state before it, in the type of the states."""
    rows, x0 = inputs.to(states[0].dtype).repeat_interleave(states[0].shape[1], dim=0), None
    for step, x in enumerate(states[:-1]):
        out = network(x.flatten(0, 1), rows, torch.tensor([int(table.timesteps[step])])).unflatten(0, x.shape[:2])
        noise, scale = noise_of(step).to(x.dtype), table.noise_scale_tensor()
        following, x0 = reverse_step(x, out, table.tensor(), step, x0, noise, clip, scale)
        yield following


@sweep(sampler=SAMPLERS, prediction_type=["epsilon", "sample", "v_prediction"], name=SMALL, clip=[None, 0.8])
def test_given_the_network_a_step_is_the_same_bits_as_in_the_reference(
    one_thread, name, sampler, prediction_type, clip
):
    config = SMALL[name]
    packed = PackedDenoiser(layer_program(random_denoiser(config)))
    table, inputs = table_of(sampler, 5, prediction_type), conditions(config, 2)
    states = states_of(packed, inputs, table, clip)
    steps = reference_steps(packed.denoise, states, inputs, table, clip)
    for step, (state, expected) in enumerate(zip(states[1:], steps, strict=True)):
        assert torch.equal(state, expected), f"step {step}"


@sweep(sampler=SAMPLERS, prediction_type=["epsilon", "sample", "v_prediction"], name=SMALL)
def test_every_step_is_as_exact_as_that_of_the_module(isa, one_thread, name, sampler, prediction_type):
    """Teacher-forced: each step starts from the engine's own state."""
    config = SMALL[name]
    net = random_denoiser(config)
    table, inputs = table_of(sampler, 4, prediction_type), conditions(config, 2)
    states = states_of(PackedDenoiser(layer_program(net)), inputs, table, None)
    plain = reference_steps(net, states, inputs, table, None)
    doubles = reference_steps(in_float64(net), [state.double() for state in states], inputs, table, None)
    for step, (state, baseline, exact) in enumerate(zip(states[1:], plain, doubles, strict=True)):
        bound = 2 * (baseline - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (state - exact).abs().max() <= bound, f"step {step}"


@sweep(sampler=SAMPLERS, prediction_type=["sample", "v_prediction"], name=SMALL)
def test_the_whole_chain_ends_where_that_of_the_module_does(isa, one_thread, name, sampler, prediction_type):
    config = SMALL[name]
    net, table = random_denoiser(config), table_of(sampler, 10, prediction_type)
    inputs, options = conditions(config, 3), {"seed": 5, "num_hypotheses": 4, "clip_sample_range": 3.0}
    result = sample(PackedDenoiser(layer_program(net)), inputs, table, **options)
    assert (result - sample(net, inputs, table, backend="torch", **options)).abs().max() <= 1e-4


def test_the_released_chain_of_a_hundred_clipped_steps(isa, one_thread):
    config = SMALL["paper"]
    net, table = random_denoiser(config), step_table(NoiseSchedule(100), 100, sampler="ddpm")
    inputs, options = conditions(config, 2), {"seed": 5, "num_hypotheses": 3, "clip_sample_range": 1.0}
    result = sample(PackedDenoiser(layer_program(net)), inputs, table, **options)
    assert (result - sample(net, inputs, table, backend="torch", **options)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_takes_the_chain_of_its_own_formulas(isa, one_thread, name):
    config = SMALL[name]
    net, table, inputs = random_denoiser(config), table_of("ddpm", 4, "sample"), conditions(config, 3)
    program = layer_program(net)

    def rounded(x, condition, timesteps):
        return run_program(program, x, condition, timesteps, torch.float32, through_bfloat16)

    options = {"seed": 5, "num_hypotheses": 4}
    exact = sample(net, inputs, table, **options)
    plain = sample(rounded, inputs, table, **options)
    result = sample(PackedDenoiser(program, "bfloat16"), inputs, table, **options)
    error, baseline = (result - exact).abs().max(), (plain - exact).abs().max()
    assert 0.0 < error <= 2 * baseline + 1e-3 * exact.abs().max()


def test_a_seed_has_64_bits(isa):
    program = LayerProgram(2, (3, 3), (Linear(0, 1, torch.eye(3), torch.zeros(3)),), lambda timesteps: [])
    table = step_table(NoiseSchedule(4), 1, prediction_type="sample")
    for seed in (0, -1, 2**63, 2**64 - 1, -(2**63)):
        result = sample(PackedDenoiser(program), torch.empty(3, 2, 0), table, seed=seed, num_hypotheses=2)
        noise = philox_normal(seed, torch.arange(3), torch.arange(2), INITIAL_NOISE_STEP, 6)
        assert torch.equal(result.flatten(2), noise), seed


# --- What has no weight does not count ------------------------------------------------------------------------------


def test_a_term_without_a_coefficient_may_be_anything(isa):
    """The network says NaN in the first step, whose row does not look at it, and then infinity in the noise's scale."""
    first = torch.tensor([float("nan")])
    answer = (Linear(0, 1, torch.zeros(3, 3), torch.full((3,), float("nan"))),)
    silent = PackedDenoiser(LayerProgram(2, (3, 3), answer, lambda timesteps: []))
    rows = np.array([[1.0, 0, 0.5, 0.25, 0, 0], [2.0, 0, 0, 0.5, 0.5, 0.0]])
    table = StepTable(rows, np.array([1, 0]), np.full((2, 2, 3), np.nan))
    result = sample(silent, torch.empty(1, 2, 0), table, num_hypotheses=1)
    x = philox_normal(0, torch.arange(1), torch.arange(1), INITIAL_NOISE_STEP, 6).view(1, 1, 2, 3)
    # x0 = x, then 0.75 x; x0 = 1.5 x, then 0.75 x + 0.5 x.
    assert torch.allclose(result, 1.25 * x, atol=1e-6) and bool(first.isnan())
    # Where it does look, NaN stays, also through the clip.
    table = StepTable(np.array([[0.0, 1, 0, 1, 0, 0]]), np.array([0]))
    for clip in (None, 1.0):
        spoiled = sample(silent, torch.empty(1, 2, 0), table, num_hypotheses=1, clip_sample_range=clip)
        assert bool(spoiled.isnan().all())


@pytest.mark.parametrize("name", SMALL)
def test_a_frame_that_is_no_number_leaves_the_others_alone(isa, name):
    config = SMALL[name]
    packed, inputs = PackedDenoiser(layer_program(random_denoiser(config))), conditions(config, 9)
    table = table_of("ddpm", 3, "sample")
    expected = sample(packed, inputs, table, num_hypotheses=3)
    inputs[4] = float("nan")
    result = sample(packed, inputs, table, num_hypotheses=3)
    others = torch.arange(9) != 4
    assert torch.equal(result[others], expected[others])
    assert bool(result[4].isnan().all())
    assert bool(sample(packed, inputs[others], table, num_hypotheses=3).isfinite().all())


# --- The same bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", ["ddpm analytic", "dpm++"])
@pytest.mark.parametrize("name", SMALL)
def test_a_hypothesis_is_the_same_bits_whatever_is_beside_it(isa, name, sampler, precision, restore_threads):
    config = SMALL[name]
    packed = PackedDenoiser(layer_program(random_denoiser(config)), precision)
    inputs, frames = conditions(config, 6), torch.tensor([3, 1, -4, 10, 99, 2])
    run = partial(sample, packed, table=table_of(sampler, 3, "sample"), seed=2, clip_sample_range=2.0)
    torch.set_num_threads(1)
    expected = run(inputs, frame_ids=frames, num_hypotheses=13)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(run(inputs, frame_ids=frames, num_hypotheses=13), expected), threads
        order = torch.randperm(6)
        assert torch.equal(run(inputs[order], frame_ids=frames[order], num_hypotheses=13), expected[order]), threads
        for some in (slice(0, 1), slice(2, 5)):
            few = run(inputs[some], frame_ids=frames[some], hypothesis_ids=torch.tensor([12, 0, 5]))
            assert torch.equal(few, expected[some][:, [12, 0, 5]]), (threads, some)
        # One pose, whose columns several threads share.
        single = run(inputs[3:4], frame_ids=frames[3:4], hypothesis_ids=torch.tensor([7]))
        assert torch.equal(single, expected[3:4, 7:8]), threads
        pair = run(inputs[3:4], frame_ids=frames[3:4], hypothesis_ids=torch.tensor([7, 1]))
        assert torch.equal(pair, expected[3:4, [7, 1]]), threads


@pytest.mark.parametrize("shared", [True, False], ids=["one lifter", "two lifters"])
@pytest.mark.parametrize("kind", ["person", "image"])
def test_lifting_in_two_threads_at_once_gives_what_it_gives_alone(tmp_path, kind, shared):
    """With other steps in each thread: what one lifter keeps for the one must not serve the other."""
    lifter, size = tiny_lifter(tmp_path, kind), (1000, 800)
    lifters = [lifter, lifter if shared else tiny_lifter(tmp_path, kind)]
    settings = [{"num_inference_steps": steps, "seed": steps} for steps in (2, 3)]

    def lift(which):
        return lifters[which](people(3), image_size=size, num_hypotheses=4, backend="cpp", **settings[which]).hypotheses

    expected = [lift(0), lift(1)]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(which):
        start.wait()
        results[which] = [lift(which) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for which in (0, 1):
        assert len(results[which]) == 20
        assert all(torch.equal(result, expected[which]) for result in results[which])


# --- Memory, signals, other threads ---------------------------------------------------------------------------------

# A child process packs a network of this width and has `run(frames, hypotheses, steps)`.
CHILD = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from diffupose.config import PRESETS
from dataclasses import replace
from diffupose.networks.build import build_denoiser
from diffupose.ops import PackedDenoiser, sample
from diffupose.engines.programs import layer_program
from diffupose.schedule import NoiseSchedule, step_table
config = replace(PRESETS["base"].denoiser, hidden_dim={width}, num_layers=1)
packed = PackedDenoiser(layer_program(build_denoiser(config).eval()))
torch.set_num_threads({threads})
def run(frames, hypotheses, steps):
    inputs = torch.zeros(frames, 17, config.num_condition_channels)
    return sample(packed, inputs, table_of(steps), num_hypotheses=hypotheses)
def table_of(steps):
    return step_table(NoiseSchedule(max(steps, 1000)), steps, prediction_type="sample")
run(1, 1, 1)
"""

PEAK = """
def peak_of(*arguments):
    # The kernel forgets the highest mark of the resident memory; what comes after is the call's own.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory("VmRSS")
    result = run(*arguments)
    return memory("VmHWM") - before - result.numel() * 4 / 2**20
def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))
print(peak_of(1, 100, 2), peak_of(50, 400, 2), peak_of(1, 100, 200))
"""


def test_memory_does_not_grow_with_hypotheses_or_steps():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    code = CHILD.format(width=32, threads=2) + PEAK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    few, many, long = map(float, done.stdout.split())
    # 20,000 poses would take over 300 MB as tensors of this width.
    assert max(few, many, long) < 64
    assert max(many, long) < few + 8


@pytest.mark.alone
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child")
@pytest.mark.parametrize(
    ("frames", "hypotheses", "steps", "threads"),
    [(200, 1000, 1000, 1), (200, 1000, 1000, 2), (1, 1, 20000, 1), (1, 1, 20000, 2), (1, 1, 20000, 3)],
)
def test_interrupt_ends_a_long_call(frames, hypotheses, steps, threads):
    # The engine's part alone: what is computed once for all steps comes before.
    call = f"""
packed.parameters(torch.from_numpy(table_of({steps}).timesteps))
print("begins", flush=True)
run({frames}, {hypotheses}, {steps})
print("ended")
"""
    code = CHILD.format(width=256, threads=threads) + call
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "begins\n"
        time.sleep(0.7)
        assert child.poll() is None, "it must not end by itself"
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
        waited = time.monotonic() - sent
    finally:
        child.kill()
    assert "KeyboardInterrupt" in err and "ended" not in out
    assert "self._engine.sample(" in err, "it was interrupted elsewhere:\n" + err
    # Promised within a second; more on a machine that is busy with other things.
    assert waited < 3.0


@pytest.mark.alone
@pytest.mark.parametrize(("frames", "hypotheses"), [(20, 20), (1, 1)])
def test_other_python_threads_go_on_meanwhile(frames, hypotheses, restore_threads):
    torch.set_num_threads(2)
    config = denoiser_config("base", hidden_dim=96)
    packed = PackedDenoiser(layer_program(random_denoiser(config)))
    steps = 200 if frames > 1 else 20000
    table, inputs = step_table(NoiseSchedule(20000), steps, prediction_type="sample"), conditions(config, frames)
    packed.parameters(torch.from_numpy(table.timesteps))  # before the clock
    ticks, over = [], threading.Event()

    def tick():
        while not over.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    sample(packed, inputs, table, num_hypotheses=hypotheses)
    end = time.monotonic()
    over.set()
    thread.join()
    inside = [moment for moment in ticks if begin < moment < end]
    assert end - begin > 0.05, "too short to tell"
    assert len(inside) >= 5 and max(np.diff(inside)) < max(0.5, 0.5 * (end - begin))


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(17, 2)}, r"inputs must have shape \[B, J, C\], got \(17, 2\)"),
        ({"inputs": torch.zeros(2, 16, 2)}, r"inputs must have shape \[B, 17, 2\], got \(2, 16, 2\)"),
        ({"inputs": torch.zeros(2, 17, 3)}, r"inputs must have shape \[B, 17, 2\], got \(2, 17, 3\)"),
        ({"frame_ids": torch.zeros(2)}, "frame_ids must be int64, got torch.float32"),
        ({"frame_ids": torch.arange(3)}, r"frame_ids must have shape \[2\], got \(3,\)"),
        ({"frame_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"frame_ids must have shape \[B\], got"),
        ({"hypothesis_ids": torch.zeros(2, dtype=torch.int32)}, "hypothesis_ids must be int64, got torch.int32"),
        ({"hypothesis_ids": torch.zeros((), dtype=torch.int64)}, r"hypothesis_ids must have shape \[H\], got \(\)"),
        ({"num_hypotheses": None}, "num_hypotheses must be at least 1 when hypothesis_ids is None, got None"),
        ({"num_hypotheses": 0}, "num_hypotheses must be at least 1 when hypothesis_ids is None, got 0"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": -(2**63) - 1}, "seed must fit 64 bits"),
        ({"clip_sample_range": -1.0}, "clip_sample_range must not be negative, got -1.0"),
        ({"clip_sample_range": float("nan")}, "clip_sample_range must not be negative, got nan"),
        ({"backend": "fortran"}, "backend must be one of"),
    ],
)
def test_errors_name_the_argument(change, message):
    packed = PackedDenoiser(layer_program(random_denoiser(SMALL["paper"])))
    arguments = {"inputs": torch.zeros(2, 17, 2), "num_hypotheses": 2} | change
    with pytest.raises(ValueError, match=message):
        sample(packed, arguments.pop("inputs"), table_of("ddpm", 3, "sample"), **arguments)


ROW = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0.0, 1.0, 0.0, 1.0, 0.5, 0.0], ROW], "the first row of the step table needs x0_last, got None"),
        ([ROW, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]], "a row of the step table must have a term that is not 0"),
        ([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0], ROW], "a row of the step table must have a term that is not 0"),
    ],
)
def test_tables_that_no_chain_can_follow(rows, message):
    packed = PackedDenoiser(layer_program(random_denoiser(SMALL["paper"])))
    with pytest.raises(ValueError, match=message):
        sample(packed, torch.zeros(1, 17, 2), StepTable(np.array(rows), np.array([1, 0])), num_hypotheses=1)


def test_a_step_table_checks_its_shapes():
    rows, steps = np.array([ROW, ROW]), np.array([1, 0])
    with pytest.raises(ValueError, match=r"coefficients must have shape \[2, 6\], got \(1, 6\)"):
        StepTable(rows[:1], steps)
    for shape in ((1, 17, 3), (2, 17, 2), (2, 3)):
        with pytest.raises(ValueError, match=r"noise_scale must have shape \[2, J, 3\], got"):
            StepTable(rows, steps, np.zeros(shape))


def test_a_packed_denoiser_runs_in_the_engine_alone():
    from diffupose.errors import BackendUnavailableError

    packed = PackedDenoiser(layer_program(random_denoiser(SMALL["paper"])))
    run = partial(sample, packed, torch.zeros(1, 17, 2), table_of("ddpm", 3, "sample"), num_hypotheses=1)
    with pytest.raises(BackendUnavailableError, match="this op has cpp only"):
        run(backend="torch")
    assert torch.equal(run(backend="cpp"), run())


def test_noise_scale_of_other_joints():
    error = {"prediction_error": ERROR[:, :16]}
    table = step_table(NoiseSchedule(40), 3, sampler="ddpm", **error)
    packed = PackedDenoiser(layer_program(random_denoiser(SMALL["paper"])))
    with pytest.raises(ValueError, match=r"table must have a noise scale of 17 joints, got \(3, 16, 3\)"):
        sample(packed, torch.zeros(1, 17, 2), table, num_hypotheses=1)


@pytest.mark.parametrize(("frames", "hypotheses"), [(0, 2), (2, 0), (1, 1)])
def test_edges(frames, hypotheses):
    packed = PackedDenoiser(layer_program(random_denoiser(SMALL["paper"])))
    ids = torch.arange(hypotheses)
    result = sample(packed, torch.zeros(frames, 17, 2), table_of("ddpm", 3, "sample"), hypothesis_ids=ids)
    assert result.shape == (frames, hypotheses, 17, 3)


@pytest.mark.parametrize("joints", [15, 16])
def test_other_skeletons(isa, joints):
    config = replace(SMALL["base"], skeleton={15: "humaneva_15", 16: "h36m_16"}[joints])
    net = random_denoiser(config)
    table = step_table(NoiseSchedule(40), 5, sampler="dpm++", prediction_type="v_prediction")
    inputs = conditions(config, 2)
    result = sample(PackedDenoiser(layer_program(net)), inputs, table, num_hypotheses=3)
    assert (result - sample(net, inputs, table, num_hypotheses=3, backend="torch")).abs().max() <= 1e-4
