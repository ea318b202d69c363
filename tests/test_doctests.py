"""The examples in docstrings run and say what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import diffupose

# What a module may need beyond the package's own dependencies.
OPTIONAL = {"tensorboard", "triton"}
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(diffupose.__path__, "diffupose.")
    if not info.name.endswith(("._C", ".__main__"))
)


def test_modules_are_found():
    assert "diffupose.reference.philox_normal" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
