"""Sharded runs: a long run that a kill -9 cannot undo.

1. A folder belongs to one run: `manifest.json` says which (kind, columns, units, parameters, model fingerprint …), and
   a different run is refused.
2. Each unit of work (a layer, a text) becomes one Parquet file, written whole or not at all. Its bytes depend on the
   rows alone, so two processes on one folder can only write the same file twice.
3. Who opens the folder again computes the units that are missing or damaged, and no other.
4. The result is the shards in the order of the units: the same after any number of interruptions.

    run = ShardedRun(folder, "neurons.decode", columns, provenance, units=[f"layer-{layer}" for layer in layers])
    for unit in run.missing():
        run.write(unit, decode_layer(unit))
    result = run.finish()
"""

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.atomic import remove_stale, write_atomically
from interp.columns import Column, conform
from interp.errors import InputError, ResourceError, ResultError
from interp.parquet import FORMAT, check_format, read_parquet, write_parquet
from interp.provenance import Provenance, as_json
from interp.results import Result, build_result, check_kind

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "manifest.json"
ATTACHMENTS = "attachments.json.zlib"


class ShardedRun:
    """A run whose result is made unit by unit in a folder, and resumed there.

    Args:
        folder: new, empty, or of the same run.
        kind: of the result, "package.function".
        columns: of every shard and of the result.
        provenance: of the run; its parameters, model fingerprint, dtype, attention, kind of device and seed decide
            whether the folder is of the same run.
        units: names of the units of work, in the order of the result.
        attachments: of the result.

    Raises:
        InputError: units are empty or double, or columns and kind are malformed.
        ResultError: the folder belongs to another run, or holds files that are not ours.
        ResourceError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        kind: str,
        columns: Sequence[Column],
        provenance: Provenance,
        units: Sequence[str],
        attachments: Mapping[str, Any] | None = None,
    ) -> None:
        check_kind(kind)
        self.folder = Path(folder)
        self.kind = kind
        self.columns = tuple(columns)
        self.units = tuple(units)
        self._started = time.monotonic()
        self._valid: dict[str, tuple[int, int]] = {}
        if not self.units or len(set(self.units)) < len(self.units):
            raise InputError(f"a sharded run needs units with different names, got {list(self.units)!r:.200}")
        packed = zlib.compress(json.dumps(as_json(attachments or {}, "attachments"), sort_keys=True).encode(), level=6)
        identity = _identity(kind, self.columns, self.units, provenance, hashlib.sha256(packed).hexdigest())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self.folder)
            occupied = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise ResourceError(f"cannot use the folder {self.folder}: {error.strerror or error}") from error
        if MANIFEST in occupied:
            _check_same_run(self.folder, _read_manifest(self.folder)["run"], identity)
        elif occupied:
            raise ResultError(
                f"{self.folder} holds files that are not of a sharded run ({', '.join(occupied[:3])} …): "
                "choose an empty or a new folder"
            )
        else:
            self._write_manifest({"run": identity, "provenance": provenance.to_json(), "finished": False})
        if _digest(self.folder / ATTACHMENTS) != identity["attachments"]:  # new, killed before it, or damaged
            write_atomically(self.folder / ATTACHMENTS, lambda file: file.write(packed))

    def missing(self) -> list[str]:
        """The units that have no valid shard yet, in order. A truncated or damaged shard counts as missing."""
        return [unit for unit in self.units if not self._is_valid(unit)]

    def write(self, unit: str, frame: "pd.DataFrame") -> Path:
        """Writes one unit's rows, whole or not at all.

        Args:
            unit: one of the run's units.
            frame: its rows; none is fine.

        Returns:
            The shard's path.

        Raises:
            InputError: the unit is unknown, or the frame does not fit the columns.
            ResourceError: it cannot be written.
        """
        if unit not in self.units:
            raise InputError(f"{unit!r} is not a unit of this run; they are {list(self.units)!r:.200}")
        rows = conform(frame, self.columns)
        path = self.folder / _shard_name(self.units.index(unit), unit)
        return write_atomically(path, lambda file: write_parquet(file, rows, {"unit": unit}))

    def finish(self) -> Result:
        """The result of all shards, in the order of the units; its wall time is this process's.

        Raises:
            ResultError: units are missing.
        """
        manifest = _read_manifest(self.folder)
        result = load_folder(self.folder)
        if manifest["finished"]:
            return result
        provenance = replace(result.provenance, wall_time=time.monotonic() - self._started)
        self._write_manifest({**manifest, "provenance": provenance.to_json(), "finished": True})
        return replace(result, provenance=provenance)

    def _is_valid(self, unit: str) -> bool:
        path = self.folder / _shard_name(self.units.index(unit), unit)
        try:
            state = path.stat()
        except OSError:
            return False
        stamp = (state.st_mtime_ns, state.st_size)
        if self._valid.get(unit) != stamp:
            try:
                _read_shard(path, unit, self.columns)
            except ResultError:
                return False
            self._valid[unit] = stamp
        return True

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, "attachments_file": ATTACHMENTS, **manifest}, indent=1) + "\n"
        write_atomically(self.folder / MANIFEST, lambda file: file.write(text.encode()))


def load_folder(folder: Path) -> Result:
    """The result of a sharded run's folder; `load_result` calls it.

    Raises:
        ResultError: the folder is not of a sharded run, is damaged, or has units without a valid shard.
    """
    run = _read_manifest(folder)
    identity, provenance = run["run"], run["provenance"]
    frames, missing = [], []
    try:
        columns = tuple(Column(**entry) for entry in identity["columns"])
        units = list(identity["units"])
        for index, unit in enumerate(units):
            try:
                frames.append(_read_shard(folder / _shard_name(index, unit), unit, columns))
            except ResultError:
                missing.append(unit)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error
    if missing:
        named = ", ".join(map(repr, missing[:10])) + (" …" if len(missing) > 10 else "")
        raise ResultError(
            f"{folder} is unfinished: {len(missing)} of {len(units)} units are missing or damaged ({named}); "
            "run the same command with the same folder again, and it computes only these"
        )
    packed = folder / ATTACHMENTS
    if _digest(packed) != identity.get("attachments"):
        raise ResultError(f"{packed} is missing or damaged; run the same command with the same folder again")
    attachments = json.loads(zlib.decompress(packed.read_bytes()))
    try:
        return build_result(
            identity["kind"], _concatenate(frames, columns), columns, Provenance.from_json(provenance), attachments
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def _identity(
    kind: str, columns: tuple[Column, ...], units: tuple[str, ...], provenance: Provenance, attachments: str
) -> dict[str, Any]:
    """What must agree for two processes to work on the same run."""
    return {
        "kind": kind,
        "columns": [dict(vars(column)) for column in columns],
        "units": as_json(units, "units"),
        "fingerprint": provenance.fingerprint,
        "dtype": provenance.dtype,
        "attention": provenance.attention,
        "device": (provenance.device or "").split(":")[0] or None,  # cuda:0 and cuda:1 may share the work
        "seed": provenance.seed,
        "parameters": provenance.parameters,
        "attachments": attachments,
    }


def _check_same_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    differences = []
    for name, value in ours.items():
        found = theirs.get(name)
        if json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True):
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            differences += [
                f"{name}.{key} is {found.get(key)!r:.80} there and {value.get(key)!r:.80} here"
                for key in sorted(found.keys() | value.keys())
                if repr(found.get(key)) != repr(value.get(key))
            ]
        else:
            differences.append(f"{name} is {found!r:.120} there and {value!r:.120} here")
    if differences:
        raise ResultError(f"{folder} holds another run: {'; '.join(differences)}. Choose another folder")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultError(f"{folder} is not a folder of results: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("run"), dict) or "provenance" not in manifest:
        raise ResultError(f"{path} is not of a sharded run of interp: choose another folder")
    check_format(manifest, path)
    manifest.setdefault("finished", False)
    return manifest


def _read_shard(path: Path, unit: str, columns: tuple[Column, ...]) -> "pd.DataFrame":
    frame, header, _ = read_parquet(path)
    if header.get("unit") != unit:
        raise ResultError(f"{path} is of unit {header.get('unit')!r}, not {unit!r}")
    try:
        return conform(frame, columns)
    except InputError as error:
        raise ResultError(f"{path} does not fit the run's columns: {error}") from error


def _concatenate(frames: "list[pd.DataFrame]", columns: tuple[Column, ...]) -> "pd.DataFrame":
    """All rows in order; a category column gets the categories of all shards in order of first appearance."""
    import pandas as pd

    for column in columns:
        if column.dtype != "category":
            continue
        ordered = all(frame[column.name].cat.ordered for frame in frames)
        union = list(dict.fromkeys(value for frame in frames for value in frame[column.name].cat.categories))
        try:
            dtype = pd.CategoricalDtype(union, ordered=ordered)
            frames = [frame.assign(**{column.name: frame[column.name].astype(dtype)}) for frame in frames]
        except TypeError as error:
            raise InputError(f"column {column.name!r}: shards hold both text and numbers as categories") from error
    return pd.concat(frames, ignore_index=True)


def _shard_name(index: int, unit: str) -> str:
    return f"{index:05d}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', unit)[:60]}.parquet"


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _damaged(folder: Path, error: Exception) -> ResultError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ResultError(f"{folder / MANIFEST} is damaged ({reason}): choose another folder")
