"""A library is loaded, and so run, only where nobody else can have written it."""

import os
import shutil
import subprocess

import pytest

from cluster.machine import compiled

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or compiled.choose_tier()[0] is None, reason="nothing is compiled here"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return 1; }\n')
    return file


def load(source):
    """(what the library answers, why there is none), as a new process would find it."""
    compiled._load.cache_clear()
    library, reason = compiled.load(source)
    return (library.answer() if library else None), reason


def plant(tmp_path, place):
    """Another library in its place, which leaves a mark when it is loaded."""
    evil = tmp_path / "evil.cpp"
    mark = tmp_path / "loaded"
    evil.write_text(
        "#include <cstdio>\n"
        f'__attribute__((constructor)) static void run() {{ fclose(fopen("{mark}", "w")); }}\n'
        'extern "C" int answer() { return 2; }\n'
    )
    place.unlink(missing_ok=True)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", place, evil], check=True)
    return mark


def cached(tmp_path):
    [library] = (tmp_path / "cache/asuncion").glob("*.so")
    return library


def test_the_folder_and_its_libraries_are_closed_to_others_whatever_the_umask(source, tmp_path):
    before = os.umask(0)
    try:
        assert load(source) == (1, None)
        library = cached(tmp_path)
        assert (library.parent.stat().st_mode & 0o777, library.stat().st_mode & 0o777) == (0o700, 0o700)
        library.parent.chmod(0o777)  # as an earlier version made it
        assert load(source) == (1, None)
        assert library.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.parametrize("how", ["writable", pytest.param("owner", marks=AS_ROOT)])
def test_a_library_that_another_user_can_have_written_is_compiled_anew(source, tmp_path, how):
    assert load(source) == (1, None)
    library = cached(tmp_path)
    mark = plant(tmp_path, library)
    if how == "owner":
        os.chown(library, NOBODY, NOBODY)
    else:
        library.chmod(0o777)
    assert load(source) == (1, None)
    assert not mark.exists() and library.stat().st_uid == os.geteuid()


@AS_ROOT
@pytest.mark.parametrize("by_link", [False, True])
def test_a_folder_of_another_user_is_refused_with_the_remedy(source, tmp_path, by_link):
    theirs = tmp_path / ("theirs" if by_link else "cache/asuncion")
    theirs.mkdir(parents=True)
    if by_link:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache/asuncion").symlink_to(theirs)
    os.chown(theirs, NOBODY, NOBODY)
    answer, reason = load(source)
    assert answer is None and list(theirs.iterdir()) == []
    assert f"belongs to uid {NOBODY}; set XDG_CACHE_HOME to a folder of your own" in reason
