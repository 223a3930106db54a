"""Write a file whole or not at all.

1. The bytes go into a temporary file with a unique name in the target's own folder, locked while it is written.
2. The file is flushed to the disk (fsync) and renamed over the target in one step (`os.replace`).
3. The folder is flushed, so that the rename outlives a power cut.

Whatever goes wrong before step 2, the target keeps what it had and the temporary file is removed. Only a `kill -9` or
a power cut leaves one behind; `remove_stale` takes those away, and the lock tells them from one still being written.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from interp.errors import ResourceError

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so age alone tells what is stale
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{16}\.tmp$", re.DOTALL)
_OLD = 24 * 3600.0  # seconds after which a temporary file that cannot be locked counts as stale


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> Path:
    """Lets `write` fill a binary file and puts it at `path` in one step; missing parent folders are made.

    Args:
        path: the file to make or replace; a symbolic link is followed.
        write: gets a writable binary file.

    Returns:
        The path.

    Raises:
        ResourceError: the file cannot be written (disk full, no permission, not a folder …). What was there stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "note.txt", lambda file: file.write(b"whole")).read_bytes()
        b'whole'
    """
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder; give a file name")
        while not _write_and_replace(target, write):
            pass  # a cleaner took the temporary file before we held its lock: once more under another name
        _sync_folder(target.parent)
    except OSError as error:
        raise ResourceError(_explain(target, error)) from error
    return Path(path)


def remove_stale(folder: str | os.PathLike[str]) -> list[Path]:
    """Removes temporary files that a killed process left in `folder`; those that another process is writing stay."""
    removed = []
    for path in sorted(Path(folder).iterdir()):
        if not is_temporary(path.name):
            continue
        with contextlib.suppress(OSError), path.open("r+b") as file:  # it may be gone by now: then nothing is to do
            if fcntl is not None:
                try:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                except OSError:  # a file system without locks
                    if time.time() - path.stat().st_mtime < _OLD:
                        continue
            elif time.time() - path.stat().st_mtime < _OLD:
                continue
            path.unlink()
            removed.append(path)
    return removed


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `write_atomically` gives to its temporary files."""
    return _TEMPORARY.match(name) is not None


def _write_and_replace(target: Path, write: Callable[[BinaryIO], object]) -> bool:
    """One attempt; False when a cleaner removed the temporary file before its lock was held."""
    # 0o666 less the umask, as for any new file (tempfile would make it private); the name stays below 255 bytes.
    stem = target.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
    temporary = target.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "w+b") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink == 0:
                    return False
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while the lock is held; Windows cannot rename an open file
                os.replace(temporary, target)
        if fcntl is None:
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return True


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open or flush a folder; the file itself is safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explain(target: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(target.parent).free / 2**20:,.1f} MiB are free there"
        return f"cannot write {target}: {reason}{free}. Nothing was changed; free some space or choose another folder."
    return f"cannot write {target}: {reason}. Nothing was changed; check the folder and its permissions."


def replace_folder(folder: str | os.PathLike[str], fill: Callable[[Path], object]) -> Path:
    """Let `fill` write into a new folder and put it at `folder` in one rename; whatever goes wrong, what was there stays.

    Raises:
        ResourceError: it cannot be written.
    """
    target = Path(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.tmp-", dir=target.parent) as workspace:
            ready = Path(workspace, "ready")
            ready.mkdir()
            fill(ready)
            for path in filter(Path.is_file, ready.rglob("*")):
                path.chmod(0o644)  # safetensors makes its files private
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if target.exists():
                os.replace(target, Path(workspace, "old"))
            os.replace(ready, target)
    except OSError as error:
        raise ResourceError(f"cannot write {target}: {error.strerror or error}; choose another folder") from error
    return target
