"""The loop of a network and the Triton step: the same as the reference's, and when a step is captured.

Without a GPU ``_capture`` is replaced by what captures nothing and runs the body: all but it is tested everywhere.
"""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffupose.engines import captured_loop
from diffupose.engines.engine import SampleRequest
from diffupose.engines.sample import sample
from diffupose.errors import BackendUnavailableError
from diffupose.schedule import NoiseSchedule, step_table
from diffupose.testing import requires_cuda


class Network(nn.Module):
    """A layer and the timestep, with channels more than are needed, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x, condition, timesteps):
        self.calls += 1
        return self.layer(torch.cat((x, condition), dim=-1)) + (timesteps.view(-1, 1, 1) / 50.0).to(x)


def table(steps=4, sampler="ddpm", **options):
    return step_table(NoiseSchedule(20), steps, sampler=sampler, prediction_type="sample", **options)


def draw(network, inputs, steps=None, *, backend="triton", hypotheses=3, **options):
    with torch.no_grad():
        return sample(network, inputs, steps or table(), num_hypotheses=hypotheses, backend=backend, **options)


@pytest.fixture
def network(device):
    return Network().to(device).eval()


@pytest.fixture
def captured(monkeypatch):
    """Capture on every device, by doing nothing, and return the list of what was captured."""
    bodies = []

    def capture(advance, device):
        bodies.append(advance)
        return advance

    monkeypatch.setattr(captured_loop, "_capture", capture)
    monkeypatch.setattr(captured_loop, "_is_kept", lambda network, request: True)
    monkeypatch.setattr(captured_loop, "_LOOPS", type(captured_loop._LOOPS)())
    return bodies


SAMPLERS = [
    {"sampler": "ddpm"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.5},
    {"sampler": "dpm++"},
    {"sampler": "ddpm", "prediction_error": True},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("clip", [None, 0.7])
def test_same_as_the_reference(options, clip, network, device):
    inputs = torch.randn(2, 5, 2, device=device)
    if "prediction_error" in options:
        options = options | {"prediction_error": 0.1 + torch.rand(20, 5, 3).double().numpy()}
    settings = {"seed": 2**64 - 5, "frame_ids": torch.tensor([9, -1], device=device),
                "clip_sample_range": clip}  # fmt: skip
    steps = table(4, **options)
    result = draw(network, inputs, steps, **settings)
    expected = draw(network, inputs, steps, backend="torch", **settings)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert not result.is_inference()
    ids = torch.tensor([2, 7], device=device)
    some = draw(network, inputs, steps, hypothesis_ids=ids, **settings)
    torch.testing.assert_close(some[:, 0], expected[:, 2], rtol=0, atol=1e-5)


def test_half_precision(network, device):
    inputs = torch.randn(2, 5, 2, device=device)
    result = draw(network.half(), inputs.half())
    assert result.dtype == torch.float16
    torch.testing.assert_close(result, draw(network, inputs.half(), backend="torch"), rtol=0, atol=5e-3)


@pytest.mark.parametrize("batch", [0, 1])
def test_edges(batch, network, device):
    assert draw(network, torch.randn(batch, 1, 2, device=device)).shape == (batch, 3, 1, 3)


def test_the_second_call_captures(captured, network, device):
    """One graph per shape and kind of sampler; numbers, seeds and tables may change under it."""
    inputs = torch.randn(2, 5, 2, device=device)
    first = draw(network, inputs)
    assert not captured
    again = draw(network, inputs)
    assert len(captured) == 1 and torch.equal(first, again)
    for options in ({"seed": 4}, {"frame_ids": torch.tensor([5, 6], device=device)}):
        expected = draw(network, inputs, backend="torch", **options)
        torch.testing.assert_close(draw(network, inputs, **options), expected, rtol=0, atol=1e-5)
    other, steps = torch.randn(2, 5, 2, device=device), table(4, "ddim", eta=0.7)
    expected = draw(network, other, steps, backend="torch")
    torch.testing.assert_close(draw(network, other, steps), expected, rtol=0, atol=1e-5)
    assert len(captured) == 1
    torch.testing.assert_close(first, again, rtol=0, atol=0)  # results are not the buffers
    draw(network, inputs, hypotheses=4)
    draw(network, inputs, hypotheses=4)
    assert len(captured) == 2


def test_in_and_out_of_inference_mode(captured, network, device):
    inputs = torch.randn(1, 5, 2, device=device)
    for _ in range(2):
        with torch.inference_mode():
            inside = draw(network, inputs)
        outside = draw(network, inputs)
        assert inside.is_inference() and not outside.is_inference() and torch.equal(inside, outside)
    assert len(captured) == 1


def test_weights(captured, network, device):
    """Changed in place they are seen by the graph; new ones need a new graph."""
    inputs = torch.randn(1, 5, 2, device=device)
    draw(network, inputs), draw(network, inputs)
    with torch.no_grad():
        network.layer.weight.mul_(0.5)
    torch.testing.assert_close(draw(network, inputs), draw(network, inputs, backend="torch"), rtol=0, atol=1e-5)
    assert len(captured) == 1
    network.layer.weight = nn.Parameter(torch.randn(5, 5, device=device))
    torch.testing.assert_close(draw(network, inputs), draw(network, inputs, backend="torch"), rtol=0, atol=1e-5)
    draw(network, inputs)
    assert len(captured) == 2


def test_graphs_are_given_up(captured, network, device):
    """Those of many shapes, and all of a network that is gone."""
    for hypotheses in range(1, captured_loop._MOST_LOOPS + 3):
        draw(network, torch.randn(1, 5, 2, device=device), hypotheses=hypotheses)
    assert len(captured_loop._LOOPS[network]) == captured_loop._MOST_LOOPS
    loops = captured_loop._LOOPS
    short_lived = Network().to(device).eval()
    draw(short_lived, torch.randn(1, 5, 2, device=device))
    assert len(loops) == 2
    del short_lived
    gc.collect()
    assert len(loops) == 1


def test_a_network_that_cannot_be_captured(captured, monkeypatch, network, device):
    def fail(advance, device):
        captured.append(advance)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(captured_loop, "_capture", fail)
    inputs = torch.randn(1, 5, 2, device=device)
    expected = draw(network, inputs)
    with pytest.warns(UserWarning, match="runs without a CUDA graph, slower: operation not permitted"):
        assert torch.equal(draw(network, inputs), expected)
    assert torch.equal(draw(network, inputs), expected)
    assert len(captured) == 1


def test_no_memory_for_a_graph(captured, monkeypatch, network, device):
    """It may be there another time."""
    capture = captured_loop._capture

    def fail(advance, device):
        raise torch.cuda.OutOfMemoryError("out of memory")

    inputs = torch.randn(1, 5, 2, device=device)
    expected = draw(network, inputs)
    monkeypatch.setattr(captured_loop, "_capture", fail)
    assert torch.equal(draw(network, inputs), expected)
    monkeypatch.setattr(captured_loop, "_capture", capture)
    assert torch.equal(draw(network, inputs), expected)
    assert len(captured) == 1


def other_layer(network):
    network.layer = nn.Linear(5, 5).to(network.layer.weight.device).eval()


def other_forward(network):
    network.forward = lambda x, condition, timesteps: 0.5 * x


def other_precision(network):
    torch.set_float32_matmul_precision("high")


CHANGES = {
    "clip": (None, {"clip_sample_range": 0.3}),
    "without noise": (None, {"steps": table(4, "ddim")}),
    "with history": (None, {"steps": table(4, "dpm++")}),
    "noise scale": (None, {"steps": table(4, prediction_error=0.1 + torch.rand(20, 5, 3).double().numpy())}),
    "steps": (None, {"steps": table(3)}),
    "layer": (other_layer, {}),
    "forward": (other_forward, {}),
    "precision": (other_precision, {}),
    "dtype": (lambda network: network.half(), {}),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_needs_another_graph(name, captured, network, device):
    change, options = CHANGES[name]
    inputs = torch.randn(2, 5, 2, device=device)
    draw(network, inputs), draw(network, inputs)
    assert len(captured) == 1
    precision = torch.get_float32_matmul_precision()
    try:
        if change is not None:
            change(network)
        inputs = inputs.half() if name == "dtype" else inputs
        expected = draw(network, inputs, backend="torch", **options)
        for count in (1, 2, 2):
            result = draw(network, inputs, **options)
            # In float16, and in TF32, which only a GPU has, the order of sums shows.
            rounded = name == "dtype" or (name == "precision" and device.type == "cuda")
            torch.testing.assert_close(result, expected, rtol=0, atol=5e-3 if rounded else 1e-5)
            assert len(captured) == count
    finally:
        torch.set_float32_matmul_precision(precision)
    if change is not None:  # what can come no more is not kept
        assert len(captured_loop._LOOPS[network]) == 1


def test_hooks_and_autocast_are_not_captured(network, device, monkeypatch):
    """Each by itself turns a network that would be kept into one that is not."""
    on_gpu = SimpleNamespace(is_cuda=True)

    def kept(hypotheses=10):
        request = SimpleNamespace(condition=on_gpu, shape=(1, hypotheses, 5, 3))
        return captured_loop._is_kept(network, request)

    monkeypatch.setattr(captured_loop, "TRITON_IS_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kept()
    assert not kept(0)
    assert not kept(captured_loop._MOST_ROWS + 1)
    for register in (network.layer.register_forward_hook, network.layer.register_forward_pre_hook):
        hook = register(lambda *arguments: None)
        assert not kept()
        hook.remove()
    network.train()
    assert not kept()
    network.eval()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: True)
        assert not kept()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not kept()


def test_what_is_kept(network, device):
    """On the CPU nothing is: the loop runs step by step."""
    ids = torch.arange(1, device=device), torch.arange(10, device=device)
    request = SampleRequest(torch.randn(1, 5, 2, device=device), table(), 0, *ids, None)
    assert captured_loop._is_kept(network, request) == (device.type == "cuda")
    assert not captured_loop._is_kept(network.train(), request)
    network.eval().layer.register_forward_hook(lambda *arguments: None)
    assert not captured_loop._is_kept(network, request)


def test_errors(network, device):
    inputs = torch.randn(1, 5, 2, device=device)
    with pytest.raises(BackendUnavailableError, match="the Triton steps have no gradient"):
        sample(network, inputs, table(), num_hypotheses=2, backend="triton")
    with pytest.raises(BackendUnavailableError, match=r"take float32, float16 and bfloat16, got torch\.float64"):
        draw(network.double(), inputs.double())
    with pytest.raises(BackendUnavailableError, match=r"take a torch\.nn\.Module, got function"):
        draw(lambda x, condition, timesteps: x, inputs)
    assert draw(lambda x, condition, timesteps: x, inputs, backend=None).shape == (1, 3, 5, 3)
    steps = table(4, "dpm++")
    steps.coefficients[0, 4] = 0.5
    with pytest.raises(ValueError, match="the first row of the step table needs x0_last"):
        draw(network, inputs, steps)


@requires_cuda
def test_a_graph_replays(network, device):
    """The network's Python code runs in the first two calls alone."""
    inputs = torch.randn(2, 5, 2, device=device)
    first = draw(network, inputs)
    torch.testing.assert_close(draw(network, inputs), first, rtol=0, atol=1e-6)
    calls = network.calls
    torch.testing.assert_close(draw(network, inputs), first, rtol=0, atol=1e-6)
    assert network.calls == calls


@requires_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_graphs_on_two_gpus():
    """Each is of its own GPU, whichever is the current one."""
    networks = [Network().to(f"cuda:{index}").eval() for index in range(2)]
    for network in networks:
        inputs = torch.randn(2, 5, 2, device=network.layer.weight.device)
        expected = draw(network, inputs, backend="torch")
        for _ in range(3):
            torch.testing.assert_close(draw(network, inputs), expected, rtol=0, atol=1e-5)


@requires_cuda
def test_graphs_outlive_each_other(device):
    """Memory and workspaces of a graph that is given up are not those of another."""
    networks, inputs = [Network().to(device).eval() for _ in range(40)], torch.randn(2, 5, 2, device=device)
    expected = [draw(network, inputs, backend="torch") for network in networks]
    for network in networks:
        draw(network, inputs), draw(network, inputs)
    del networks[::2]
    gc.collect()
    torch.cuda.empty_cache()
    for network, poses in zip(networks, expected[1::2], strict=True):
        torch.testing.assert_close(draw(network, inputs), poses, rtol=0, atol=1e-5)


@requires_cuda
def test_a_failed_capture_leaves_the_stream_alone(device):
    class Waits(Network):
        def forward(self, x, condition, timesteps):
            if bool(timesteps > 1e9):  # the host waits for the device
                raise ValueError
            return super().forward(x, condition, timesteps)

    network, inputs = Waits().to(device).eval(), torch.randn(2, 5, 2, device=device)
    stream, expected = torch.cuda.current_stream(), draw(network, inputs)
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        torch.testing.assert_close(draw(network, inputs), expected, rtol=0, atol=1e-6)
    assert torch.cuda.current_stream() == stream
    assert bool(torch.randn(1000, device=device).isfinite().all())  # the generator is not left in the capture
    torch.testing.assert_close(draw(network, inputs), expected, rtol=0, atol=1e-6)
