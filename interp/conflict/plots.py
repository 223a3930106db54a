"""Pictures of instruction conflicts, under the names by which results find them: `Result -> plotly Figure`.

follow_plots      which rules are followed, and under conflict
cras_plots        grades by dimension
localize_plots    attention drift by head and layer, and where the last token looks
patch_plots       what patching brings back, and what ablating heads does
align_plots       training of an adapter
"""

from interp.conflict.align_plots import align, preferences
from interp.conflict.cras_plots import score
from interp.conflict.follow_plots import follow
from interp.conflict.localize_plots import layer_profile, localize, span_masses
from interp.conflict.patch_plots import ablate_heads, patch

__all__ = [
    "ablate_heads",
    "align",
    "follow",
    "layer_profile",
    "localize",
    "patch",
    "preferences",
    "score",
    "span_masses",
]
