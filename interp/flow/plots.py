"""Pictures of flow, under the names by which results find them: `Result -> plotly Figure`.

flow_text_plots    the text coloured by influence
flow_matrix_plots  token × token matrices by method
flow_graph_plots   one maximum flow on its edges, with its minimum cut; the strongest routes
equalize_plots     flows to the concepts of a prompt before and after, and what was mentioned
"""

from interp.flow.equalize_plots import equalize
from interp.flow.flow_graph_plots import edge_flows, path
from interp.flow.flow_matrix_plots import attention_flow
from interp.flow.flow_text_plots import coloured_text

__all__ = ["attention_flow", "coloured_text", "edge_flows", "equalize", "path"]
