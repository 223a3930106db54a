"""Claims go to JSON with exactly their keys and come back; wrong ones are refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import interp.report
from interp.errors import InputError, ResultError
from interp.report import Claim, claims_frame, read_claims, write_claims

CLAIM = Claim(
    "over 75 % agree", "Davies 2501.02688", 0.754, np.float32(0.5), (0.4, 0.6), np.int64(1200), np.bool_(False)
)
UNTESTED = Claim("needs 8 B", "Davies 2501.02688", "under 15 min", None, None, None, None)


def test_round_trip_with_exactly_these_keys(tmp_path: Path) -> None:
    path = write_claims(tmp_path / "claims.json", [CLAIM, UNTESTED])
    entries = json.loads(path.read_text())
    assert [list(entry) for entry in entries] == [["claim", "source", "paper", "ours", "interval", "n", "holds"]] * 2
    assert entries[0]["interval"] == [0.4, 0.6]
    assert entries[1]["holds"] is None
    assert read_claims(path) == [CLAIM, UNTESTED]
    assert type(CLAIM.n) is int
    assert CLAIM.holds is False


def test_frame_for_display() -> None:
    frame = claims_frame([CLAIM, UNTESTED])
    assert list(frame) == ["claim", "paper", "ours", "interval", "n", "holds"]
    assert frame.iloc[0].tolist() == ["over 75 % agree", "0.754", "0.5", "0.4 … 0.6", "1,200", "no"]
    assert frame.iloc[1].tolist() == ["needs 8 B", "under 15 min", "–", "–", "–", "not testable"]
    assert list(claims_frame([])) == list(frame)
    open_ = dataclasses.replace(CLAIM, holds=None)
    assert claims_frame([open_, dataclasses.replace(CLAIM, holds=True)])["holds"].tolist() == ["open", "yes"]
    unmeasured = [dataclasses.replace(open_, ours="not measured", interval=None, n=n) for n in (None, 0)]
    assert claims_frame(unmeasured)["holds"].tolist() == ["not testable"] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"claim": 3},
        {"ours": float("nan")},
        {"paper": True},
        {"interval": (1.0,)},
        {"interval": "ab"},
        {"interval": (2.0, 1.0)},
        {"interval": (0.0, float("inf"))},
        {"n": 1.5},
        {"n": -1},
        {"holds": "yes"},
        {"holds": 1},
    ],
)
def test_wrong_fields_are_refused(change: dict) -> None:
    with pytest.raises(InputError, match="claim's"):
        Claim(**{**vars(CLAIM), **change})


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"claim": "x"}]', '[{"claim": 1, "source": "", "paper": null, "ours": null, "interval": null, "n": null, "holds": null}]'])  # fmt: skip  # noqa: E501
def test_wrong_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "claims.json"
    with pytest.raises(ResultError, match="no claims at"):
        read_claims(path)
    path.write_text(text)
    with pytest.raises(ResultError, match=r"claims\.json"):
        read_claims(path)


def test_the_package_names_them() -> None:
    assert set(interp.report.__all__) <= set(dir(interp.report)) | {"Section", "titled", "write_report"}
