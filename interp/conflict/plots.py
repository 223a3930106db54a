"""Pictures of instruction conflicts, under the names by which results find them: `Result -> plotly Figure`.

follow_plots    which rules are followed, and under conflict
"""

from interp.conflict.follow_plots import follow

__all__ = ["follow"]
