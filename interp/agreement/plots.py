"""Pictures of agreement, under the names by which results find them: `Result -> plotly Figure`.

agreement_plots     every two methods, beside chance and ceiling
cluster_plots       the tree of methods that agree
faithfulness_plots  who is faithful; what removing the first tokens does
explanation_plots   one text coloured by every method; completeness; what a method costs
"""

from interp.agreement.agreement_plots import against_chance, pairwise_agreement
from interp.agreement.cluster_plots import clusters
from interp.agreement.explanation_plots import completeness, costs, explain
from interp.agreement.faithfulness_plots import faithfulness, removal_curves

__all__ = [
    "against_chance",
    "clusters",
    "completeness",
    "costs",
    "explain",
    "faithfulness",
    "pairwise_agreement",
    "removal_curves",
]
