"""A file is written whole or not at all, whatever interrupts it."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from interp.atomic import is_temporary, remove_stale, write_atomically
from interp.errors import ResourceError


def test_writes_and_replaces_through_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.bin"
    real.write_bytes(b"old")
    link = tmp_path / "link.bin"
    link.symlink_to(real)
    assert write_atomically(link, lambda file: file.write(b"new")) == link
    assert real.read_bytes() == b"new"
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link.bin", "real.bin"]


def test_new_file_follows_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    ours = write_atomically(tmp_path / "made" / "here.bin", lambda file: file.write(b"x"))
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), SystemExit(1)])
def test_interruption_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise error

    with pytest.raises(type(error)):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_full_disk_names_path_and_free_space(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def write(file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match=r"a\.bin: No space left on device; [\d,.]+ MiB are free"):
        write_atomically(target, write)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_real_limit_of_the_system(tmp_path: Path) -> None:
    """The kernel refuses the write, as it does on a full disk or over a quota."""
    code = f"""
import resource, signal
from interp.atomic import write_atomically
from interp.errors import ResourceError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically({str(tmp_path / "big.bin")!r}, lambda file: file.write(b"x" * 100_000))
except ResourceError as error:
    print(error)
"""
    assert resource.RLIMIT_FSIZE is not None
    assert signal.SIGXFSZ is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "big.bin: File too large" in done.stdout
    assert os.listdir(tmp_path) == []


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match="cannot write"):
        write_atomically(tmp_path / "file" / "x.bin", lambda file: None)
    with pytest.raises(ResourceError, match="folder"):
        write_atomically(tmp_path, lambda file: None)


def test_long_names(tmp_path: Path) -> None:
    name = "ä" * 120 + ".bin"  # 244 bytes of the 255 that a file system allows
    assert write_atomically(tmp_path / name, lambda file: file.write(b"x")).read_bytes() == b"x"


def test_stale_files_go_and_living_ones_stay(tmp_path: Path) -> None:
    code = f"""
import sys, time
from interp.atomic import write_atomically
def write(file):
    file.write(b"half"); file.flush(); print("writing", flush=True); time.sleep(60)
write_atomically({str(tmp_path / "a.bin")!r}, write)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert all(is_temporary(name) for name in os.listdir(tmp_path))
        assert remove_stale(tmp_path) == []
        assert len(os.listdir(tmp_path)) == 1
        writer.kill()
        writer.wait()
        assert len(remove_stale(tmp_path)) == 1
        assert os.listdir(tmp_path) == []
    finally:
        writer.kill()
        writer.wait()


def test_other_hidden_files_are_not_ours(tmp_path: Path) -> None:
    for name in (".hidden", ".x.tmp", "a.0123456789abcdef.tmp"):
        (tmp_path / name).write_bytes(b"")
    assert remove_stale(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 3


def test_a_cleaner_that_comes_before_the_lock_costs_one_more_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    real, removed = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert write_atomically(tmp_path / "a.bin", lambda file: file.write(b"x")).read_bytes() == b"x"
    assert is_temporary(removed[0].name)
