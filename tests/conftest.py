"""Fixtures: tiny random models of every family, a tokenizer with concept words, the embedded model.

jaxtyping's shapes are checked by beartype in the tests only.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# numba cannot compile what the hook has wrapped
import interp.flow.push_relabel
import interp.neurons.vocabulary_cpu  # noqa: F401

_hook = install_import_hook(
    [
        *("interp.architectures", "interp.families", "interp.batching", "interp.capture", "interp.model"),
        *(
            "interp.sources",
            "interp.neurons",
            "interp.recorded_attention",
            "interp.sinks.measures",
            "interp.sinks.losses",
        ),
        *("interp.sinks.ablated_runs", "interp.sinks.bigram_model", "interp.sinks.bigram_backcopy"),
        *(
            f"interp.flow.{name}"
            for name in ("positions", "graph", "patterns", "exact", "widest", "rollout", "shapley")
        ),
        *(f"interp.agreement.{name}" for name in ("prefix_tree", "targets")),
        "interp.from_layer",
        *(f"interp.conflict.{name}" for name in ("patched_runs", "kept_keys")),
    ],
    "beartype.beartype",
)

from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny_models import FAMILIES, tiny_hf, tiny_tokenizer  # noqa: E402

# A tiny model's forward takes 2 ms on one thread and far longer on two busy ones.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Any:
    """A function: a fresh tiny model of a family, wrapped by load_model."""
    from interp.model import load_model

    def build(family: str = "llama", **changes: Any) -> Any:
        return load_model(tiny_hf(family, **changes), tiny_tokenizer())

    return build


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every decoder family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The real embedded model, fetched once into the user's cache."""
    from interp.model import load_model

    return load_model("smollm2-135m-instruct", device="cpu")
