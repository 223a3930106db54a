"""The figure of followed rules: what stands where."""

from __future__ import annotations

import pytest
from test_answers import frame

from interp.conflict.plots import follow
from interp.errors import InputError


def test_every_rule_has_a_mark_per_prompt_with_its_interval() -> None:
    rows = []
    for at in range(8):
        for name, rule in (("case", "capitals"), ("list", "list"), ("case", "small")):
            rows += [(name, rule, f"t{at}", "none", False, True), (name, rule, f"t{at}", "conflict", at < 4, False)]
    drawn = follow(frame(rows))
    assert [trace.name for trace in drawn.data] == ["no rule", "in the system turn, the opposite from the user"]
    assert list(drawn.layout.yaxis.ticktext) == ["case: capitals", "case: small", "list: list"]
    conflict = drawn.data[1]
    assert conflict.x.tolist() == [0.5] * 3
    assert (conflict.x - conflict.error_x.arrayminus >= 0).all()
    assert (conflict.error_x.arrayminus > 0.1).all()
    assert drawn.data[0].x.tolist() == [0] * 3


def test_another_kind_of_result_is_refused() -> None:
    from interp.conflict.answers import FOLLOW_COLUMNS
    from interp.provenance import Provenance
    from interp.results import Result

    other = Result(
        "conflict.other", frame([("case", "capitals", "t", "none", True, False)]).frame, FOLLOW_COLUMNS, Provenance()
    )
    with pytest.raises(InputError, match="expected one of"):
        follow(other)
