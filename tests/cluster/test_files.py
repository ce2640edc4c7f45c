import errno
import os

import pytest

from cluster import files


def test_json_survives_the_round_trip_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    files.write_json(path, {"x": [1, 2.5, None]})
    assert files.read_json(path) == {"x": [1, 2.5, None]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'") as caught:
        files.write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent/a\.txt'"):
        files.write_text(tmp_path / "absent" / "a.txt", "x")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_what_is_not_json_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        files.read_json(path)


def test_nan_is_refused_by_name_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: Out of range float"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_whole_and_leftovers_of_a_killed_process_go(tmp_path):
    target = tmp_path / "target"
    for leftover in (".target.partial", ".target.replaced"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "junk").touch()
    for content in ("old", "new"):
        with files.replace_folder(target) as folder:
            assert os.listdir(folder) == []
            (folder / content).write_text(content)
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["new"]


def test_a_name_stays_in_its_folder(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for place in (folder / "sub", outside):
        place.mkdir(parents=True)
        (place / "x").touch()
    (folder / "good").symlink_to("sub/x")
    (folder / "bad").symlink_to("../outside/x")
    (folder / "absolute").symlink_to(outside / "x")
    (folder / "away").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    for name in ("sub/x", "good", "absent", "sub/../good"):
        assert files.inside(folder, name) == folder / name
    for name in ("../outside/x", "bad", "absolute", "away/x", str(outside / "x"), str(folder / "good"), ".."):
        with pytest.raises(ValueError, match=r": leads out of .*folder, to .*; put the file itself there"):
            files.inside(folder, name)
    with pytest.raises(ValueError, match="leads nowhere"):
        files.inside(folder, "loop")
    (tmp_path / "linked").symlink_to(folder)  # how one comes to the folder does not matter
    assert files.inside(tmp_path / "linked", "good").exists()


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs_and_nowhere_else(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    for place in (blobs, snapshot, tmp_path / "models--c--d/blobs"):
        place.mkdir(parents=True)
        (place / "abc").touch()
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert files.inside(snapshot, "config.json").is_file()
    for number, target in enumerate(("../../../models--c--d/blobs/abc", "../../refs", "../../../x")):
        (snapshot / f"bad{number}").symlink_to(target)
        with pytest.raises(ValueError, match="leads out of"):
            files.inside(snapshot, f"bad{number}")


def fill(target, *, before_leaving):
    with files.replace_folder(target) as folder:
        (folder / "new").touch()
        before_leaving()


@pytest.mark.parametrize("failing", ["the block", "fsync", "rename"])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path, monkeypatch, failing):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if failing == "rename":
        monkeypatch.setattr(type(target), "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        fill(target, before_leaving=fail if failing == "the block" else lambda: None)
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["old"]


def test_a_size_has_three_digits_and_a_unit():
    sizes = [0, 999, 1000, 846_300, 999_499, 999_500, 1_581_056, 28.4e9, 3.2e15]
    texts = ["0 bytes", "999 bytes", "1 kB", "846 kB", "999 kB", "1 MB", "1.58 MB", "28.4 GB", "3.2e+03 TB"]
    assert [files.size_text(size) for size in sizes] == texts
