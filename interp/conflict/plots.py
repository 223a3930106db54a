"""Pictures of instruction conflicts, under the names by which results find them: `Result -> plotly Figure`.

follow_plots      which rules are followed, and under conflict
localize_plots    attention drift by head and layer, and where the last token looks
"""

from interp.conflict.follow_plots import follow
from interp.conflict.localize_plots import layer_profile, localize, span_masses

__all__ = ["follow", "layer_profile", "localize", "span_masses"]
