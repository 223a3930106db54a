"""Sinks: which heads look at the first token, on which kind of text, what the sink tokens hold, and whether it matters."""

from importlib import import_module
from typing import Any

_NAMES = {
    "scan": "scanning",
    "Scan": "scan_table",
    "compare": "comparison",
    "classify": "classification",
    "ablate": "ablation",
    "against_random": "ablation",
    "between_domains": "ablation",
    "residual_peak_origin": "residual_peaks",
    "origin": "residual_peaks",
    "evict": "eviction",
    "DOMAINS": "domains",
    "read_domain": "domains",
    "domain_sequences": "sequences",
    "BigramBackcopy": "bigram_backcopy",
    "train_toy": "bigram_training",
}
# Whose further functions are reached as `interp.sinks.ablation.summary`.
_MODULES = ("ablation", "eviction", "plots", "residual_peaks")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "RESULT_TYPES":
        from interp.sinks.scan_table import Scan

        return {"sinks.scan": Scan}
    if name in _MODULES:
        return import_module(f"interp.sinks.{name}")
    if name in _NAMES:
        return getattr(import_module(f"interp.sinks.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'interp.sinks' has no attribute {name!r}")
