"""Small lifters of both kinds, and one thread for every test."""

from __future__ import annotations

import pytest
from support.tiny_lifters import tiny_lifter


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def person_lifter(tmp_path_factory):
    return tiny_lifter(tmp_path_factory.mktemp("person"))


@pytest.fixture(scope="module")
def image_lifter(tmp_path_factory):
    return tiny_lifter(tmp_path_factory.mktemp("image"), "image")


@pytest.fixture(params=["person", "image"])
def lifter(request, person_lifter, image_lifter):
    return person_lifter if request.param == "person" else image_lifter
