"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from diffupose.files import atomic_path, check_output


def names(folder):
    return sorted(item.name for item in folder.iterdir())


def test_success(tmp_path):
    target = tmp_path / "a.json"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
        temporary.write_text("new")
        assert names(tmp_path) == [temporary.name] != ["a.json"]
    assert names(tmp_path) == ["a.json"]
    assert target.read_text() == "new"


def test_the_old_file_is_there_until_the_new_one_is(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with atomic_path(str(target)) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [False, True])
def test_failure_inside(tmp_path, error, written):
    target = tmp_path / "a.json"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            if written:
                temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["a.json"]
    assert target.read_text() == "old"


def test_failure_of_the_rename(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="not allowed"), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == []


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.json"):
        pass
    assert names(tmp_path) == []


def test_a_name_that_ends_like_a_folder(tmp_path):
    """pathlib would write `a.json` for `a.json/`."""
    with pytest.raises(IsADirectoryError, match="is the name of a folder"):
        atomic_path(f"{tmp_path}/a.json/").__enter__()
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs /sys, which takes no files even from root")
def test_errors_name_the_file_and_not_the_temporary_one():
    with pytest.raises(OSError, match=r"'/sys/a\.json'"), atomic_path("/sys/a.json") as temporary:
        temporary.write_text("new")


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere.* does not exist"):
        atomic_path(tmp_path / "nowhere" / "a.json").__enter__()


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    check_output(link, "--out")
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["real.txt"]


def test_pipes_and_devices_are_left_alone(tmp_path):
    """A rename would put a file in their place."""
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"--out: .*pipe\.txt' is a device or a pipe, not a file"):
        check_output(pipe, "--out")
    with pytest.raises(OSError, match="is a device or a pipe"), atomic_path(pipe) as temporary:
        temporary.write_text("new")
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe.txt"]
