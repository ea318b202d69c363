"""From the name of a device to the device."""

from __future__ import annotations

import torch


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; ``"auto"`` is a GPU if there is one, else the CPU.

    Raises:
        ValueError: If PyTorch cannot use such a device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that is here, got {str(name)!r} on a machine without a GPU")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto or one that PyTorch can use here, got {str(name)!r}: {reason}") from None
    if device.type == "meta":
        raise ValueError("device must be auto or one that holds numbers, got 'meta'")
    return device
