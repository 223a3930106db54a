"""Neurons: decode MLP weights through the LM head, find concepts, clamp or remove them, compare models."""

from importlib import import_module
from typing import Any

_NAMES = {
    "Atlas": "atlas",
    "decode": "decoding",
    "decode_checkpoint": "checkpoint",
    "compare": "comparison",
    "dose_response": "clamping",
    "search_clamp": "clamp_search",
    "neuron_statistics": "statistics",
    "concept_of": "concepts",
    "concept_vector": "concept_vectors",
    "plan_edit": "editing",
    "apply_edit": "editing",
    "edited": "editing",
    "reverse": "editing",
    "edit_report": "edit_effects",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name == "RESULT_TYPES":
        from interp.neurons.atlas import Atlas

        return {"neurons.atlas": Atlas}
    if name in _NAMES:
        return getattr(import_module(f"interp.neurons.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'interp.neurons' has no attribute {name!r}")
