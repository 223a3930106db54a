"""A model that says one of two texts: a list where the last user turn asks for one, prose otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from interp.conflict import answers, contrasts, preferences
from interp.conflict.answers import Answer
from interp.conflict.dialogues import Dialogue, encode_dialogue

PROSE = "The sea is deep. It is cold. Fish live there. Nobody knows all of it."
LIST = "1. The sea is deep.\n2. It is cold."


def answer(model: Any, ids: Sequence[int]) -> Answer:
    """What is said to a prompt."""
    asked = model.decode(ids, skip_special_tokens=False).lower()
    asked = asked[asked.rfind("user") :]
    wants = ("numbered" in asked or "1., 2., 3." in asked) and "forbids" not in asked
    text = LIST if wants else PROSE
    return Answer(text, (*model.tokenizer(text, add_special_tokens=False)["input_ids"], 2), True)


def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model answer so."""

    def answer_ids(model: Any, encoded: Sequence[Sequence[int]], **_: Any) -> list[Answer]:
        return [answer(model, ids) for ids in encoded]

    def generate(model: Any, dialogues: Sequence[Dialogue], *, template: str | None = None, **_: Any) -> list[Answer]:
        return answer_ids(model, [encode_dialogue(model, one, template=template).ids for one in dialogues])

    monkeypatch.setattr(answers, "answer_ids", answer_ids)
    for module in (preferences, contrasts):
        monkeypatch.setattr(module, "generate_answers", generate)
