"""Pictures of sinks, under the names by which results find them: `Result -> plotly Figure`.

scan_plots      maps, scatters, norms and curves of a scan; differences between domains; names of heads
evidence_plots  ablation, origin of the residual peak, eviction
bigram_plots    the toy model
"""

from interp.sinks.bigram_plots import compare_toys, intervene_toy, toy_attention, toy_characters, train_toy
from interp.sinks.evidence_plots import ablate, ablation_scatter, evict, residual_peak_origin
from interp.sinks.scan_plots import classify, compare, domain_scatter, epsilon_curve, norms, scan, value_norms

__all__ = [
    "ablate",
    "ablation_scatter",
    "classify",
    "compare",
    "compare_toys",
    "domain_scatter",
    "epsilon_curve",
    "evict",
    "intervene_toy",
    "norms",
    "residual_peak_origin",
    "scan",
    "toy_attention",
    "toy_characters",
    "train_toy",
    "value_norms",
]
