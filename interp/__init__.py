"""interp: which neurons hold which concept, which heads are sinks on which text, and whether it matters. Names load lazily."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load_model": "interp.model",
    "Model": "interp.model",
    "clamp": "interp.intervene",
    "intervene": "interp.intervene",
    "Clamp": "interp.intervene",
    "HeadAblation": "interp.intervene",
    "run_probes": "interp.capture",
    "Result": "interp.results",
    "load_result": "interp.results",
    "InterpError": "interp.errors",
}
_PACKAGES = (
    "adapters",
    "agreement",
    "architectures",
    "batching",
    "conflict",
    "flow",
    "neurons",
    "report",
    "resources",
    "results",
    "sinks",
)

__all__ = [*_NAMES, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"interp.{name}")
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
