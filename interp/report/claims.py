"""Claims: what a paper says next to what we measured.

One row per claim: *claim · paper · ours · interval · n · holds*. `holds` is None where our figure does not decide, shown as
"open", and where it rests on no case, shown as "not testable"; such claims are never left out.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.atomic import write_atomically
from interp.errors import InputError, ResultError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Claim:
    """One statement of a source and our figure beside it.

    Attributes:
        claim: the statement.
        source: paper and section, or "ours".
        paper: its figure, as a number or words; None if it gives none.
        ours: our figure; None if there is none.
        interval: of our figure, lower and upper end; None if there is none.
        n: how many cases our figure rests on.
        holds: whether ours supports it; None: ours leaves it open, or, where n is missing or 0, cannot say.

    Raises:
        InputError: a field has the wrong type, or a number is not finite.
    """

    claim: str
    source: str
    paper: str | float | None
    ours: str | float | None
    interval: tuple[float, float] | None
    n: int | None
    holds: bool | None

    def __post_init__(self) -> None:
        for name in ("claim", "source"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"a claim's {name} must be a string, got {getattr(self, name)!r}")
        for name in ("paper", "ours"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, _number(value, name))
        if self.interval is not None:
            if isinstance(self.interval, str) or len(self.interval) != 2:
                raise InputError(f"a claim's interval is (low, high) or None, got {self.interval!r}")
            low, high = (_number(value, "interval") for value in self.interval)
            if low > high:
                raise InputError(f"a claim's interval is (low, high), got {self.interval!r}")
            object.__setattr__(self, "interval", (low, high))
        if self.n is not None:
            n = _number(self.n, "n")
            if n != int(n) or n < 0:
                raise InputError(f"a claim's n is a count, got {self.n!r}")
            object.__setattr__(self, "n", int(n))
        if self.holds is not None:
            if not isinstance(self.holds, bool) and type(self.holds).__name__ not in ("bool", "bool_"):
                raise InputError(f"a claim's holds is True, False or None, got {self.holds!r}")
            object.__setattr__(self, "holds", bool(self.holds))


def write_claims(path: str | os.PathLike[str], claims: Iterable[Claim]) -> Path:
    """Writes claims as a JSON list, one object with the fields of `Claim` each, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    text = json.dumps([asdict(claim) for claim in claims], indent=2, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()))


def read_claims(path: str | os.PathLike[str]) -> list[Claim]:
    """Reads what `write_claims` wrote.

    Raises:
        ResultError: the file is missing, not JSON, or has other keys.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultError(f"there are no claims at {path}") from error
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as JSON claims: {error}") from error
    expected = [field.name for field in fields(Claim)]
    if not isinstance(entries, list):
        raise ResultError(f"{path} must hold a JSON list of claims")
    claims = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(expected):
            raise ResultError(f"{path}: claim {index} must have exactly the keys {', '.join(expected)}")
        try:
            claims.append(Claim(**entry))
        except (InputError, TypeError) as error:
            raise ResultError(f"{path}: claim {index}: {error}") from error
    return claims


def claims_frame(claims: Iterable[Claim]) -> "pd.DataFrame":
    """The claims as text for display: claim, paper, ours, interval, n, holds.

    Example:
        >>> claims_frame([Claim("it rains", "ours", "often", 0.25, (0.1, 0.4), 12, True)]).iloc[0].tolist()
        ['it rains', 'often', '0.25', '0.1 … 0.4', '12', 'yes']
    """
    import pandas as pd

    rows = [
        {
            "claim": claim.claim,
            "paper": _shown(claim.paper),
            "ours": _shown(claim.ours),
            "interval": "–" if claim.interval is None else " … ".join(map(_shown, claim.interval)),
            "n": "–" if claim.n is None else f"{claim.n:,}",
            "holds": verdict(claim),
        }
        for claim in claims
    ]
    return pd.DataFrame(rows, columns=["claim", "paper", "ours", "interval", "n", "holds"])


def verdict(claim: Claim) -> str:
    """Whether a claim holds, in words: yes, no, open, or not testable where no case could decide it.

    Example:
        >>> verdict(Claim("it rains", "ours", "often", 0.25, (0.1, 0.4), 12, None))
        'open'
    """
    if claim.holds is not None:
        return "yes" if claim.holds else "no"
    return "open" if claim.ours is not None and claim.n else "not testable"


def _number(value: Any, name: str) -> float:
    if callable(getattr(value, "item", None)):  # a numpy scalar
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        expected = "a finite number (or text for paper and ours, or None)"
        raise InputError(f"a claim's {name} must be {expected}, got {value!r}")
    return value


def _shown(value: str | float | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4g}"
