"""A folder of its own for every test of the command line, one thread, and lifters that take no time."""

from __future__ import annotations

import pytest
from support.tiny_lifters import write_tiny_lifter


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return write_tiny_lifter(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="package")
def image_model(tmp_path_factory):
    return write_tiny_lifter(tmp_path_factory.mktemp("model") / "image.safetensors", "image")


@pytest.fixture(autouse=True)
def folder(one_thread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
