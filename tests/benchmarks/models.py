"""The embedded model, for every tool in memory of its own.

A loaded model's weights may be pages of its file, mapped, which are read a little slower than ordinary memory. Other tools get
deep copies, which are not mapped; so ours is one too.
"""

from __future__ import annotations

import copy
from typing import Any

NAME = "smollm2-135m-instruct"


def embedded() -> Any:
    """The embedded model on the CPU, its weights copied out of the file."""
    from interp.model import load_model

    loaded = load_model(NAME, device="cpu")
    return load_model(copy.deepcopy(loaded.hf), loaded.tokenizer)


def embedded_as_loaded() -> Any:
    """The same as `load_model` gives it, with every weight read once, so that mapped pages are resident."""
    from interp.model import load_model

    model = load_model(NAME, device="cpu")
    assert model.fingerprint
    return model
