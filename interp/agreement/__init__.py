"""Agreement: attention rankings against attribution rankings, their chance level and ceiling, and which of them are faithful."""

from importlib import import_module
from typing import Any

_NAMES = {
    "compare": "comparing",
    "Comparison": "comparing",
    "faithfulness": "removal",
    "faithfulness_means": "removal",
    "explain": "explaining",
    "Example": "tasks",
    "Verbalizer": "tasks",
    "NextToken": "tasks",
    "Continuation": "tasks",
    "Classifier": "tasks",
    "Coalitions": "coalitions",
    "pairwise_agreement": "pairs",
    "clusters": "clustering",
    "costs": "explanation_table",
}
_MODULES = ("ground_truth", "plots")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"interp.agreement.{name}")
    if name in _NAMES:
        return getattr(import_module(f"interp.agreement.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'interp.agreement' has no attribute {name!r}")
