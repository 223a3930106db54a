"""Flow: how much of each token can reach a position through attention: maximum flows, and what stands in for them."""

from importlib import import_module
from typing import Any

_NAMES = {
    "attention_graph": "graph",
    "AttentionGraph": "graph",
    "attention_flow": "influences",
    "influence": "influences",
    "edge_flows": "routes",
    "path": "routes",
    "equalize": "equalization",
    "maximum_flow": "exact",
    "widest_path": "widest",
    "soft_widest_path": "widest",
    "attention_rollout": "rollout",
    "column_bound": "rollout",
    "layer_bound": "rollout",
    "flow_through_tokens": "shapley",
    "shapley_interval": "shapley",
}
_MODULES = ("plots", "shapley")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"interp.flow.{name}")
    if name in _NAMES:
        return getattr(import_module(f"interp.flow.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'interp.flow' has no attribute {name!r}")
