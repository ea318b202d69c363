import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import diffupose


@pytest.fixture
def timed(benchmark) -> Callable[..., Callable[[], Any]]:
    """Return a function that binds a call so that it runs in inference mode and ends when the GPU is done."""
    benchmark.extra_info.update(
        diffupose=diffupose.__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=platform.processor() or platform.machine(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )

    def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
        call = partial(function, *args, **kwargs)

        def run() -> Any:
            with torch.inference_mode():
                result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

        run()  # compilation and first-call costs come before the clock
        return run

    return bind
