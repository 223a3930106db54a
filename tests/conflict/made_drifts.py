"""Results of a localisation made from chosen numbers, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.conflict.dialogues import SPANS
from interp.conflict.localization import CONFLICT, DRIFT_COLUMNS
from interp.provenance import Provenance
from interp.results import Result

CONTRASTS = (CONFLICT, "paraphrase")


def made_result(
    values: Any,
    tasks: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    norms: Any = None,
    name: str = "made",
) -> Result:
    """`values`: (pair, contrast, layer, head, measure); `norms`: (prompt, pair, layer, head), 1 by default; masses are drawn."""
    values = np.asarray(values, float)
    n_pairs, _, n_layers, n_heads, _ = values.shape
    masses = np.random.default_rng(0).dirichlet(np.ones(len(SPANS)), size=(n_pairs, 3, n_layers, n_heads))
    norms = np.ones((2, n_pairs, n_layers, n_heads)) if norms is None else np.asarray(norms)
    rows = []
    for pair, contrast, layer, head in np.ndindex(*values.shape[:4]):
        row: dict[str, Any] = {"pair": f"pair-{pair}", "task": tasks[pair] if tasks else f"task-{pair}"}
        row |= {"family": families[pair] if families else "case", "system_rule": "capitals", "user_rule": "small"}
        row |= {"wording": "simple", "setting": "user", "contrast": CONTRASTS[contrast], "layer": layer, "head": head}
        row |= dict(zip(("delta_mag", "delta_dir", "delta_dist"), values[pair, contrast, layer, head], strict=True))
        row |= {"consistent_norm": norms[0, pair, layer, head], "compared_norm": norms[1, pair, layer, head]}
        row |= {f"consistent_{span}": masses[pair, 0, layer, head, at] for at, span in enumerate(SPANS)}
        row |= {f"compared_{span}": masses[pair, 1 + contrast, layer, head, at] for at, span in enumerate(SPANS)}
        rows.append(row)
    provenance = Provenance(model=name, parameters={"align": "spans", "consistent": "agree"})
    return Result("conflict.localize", pd.DataFrame(rows), DRIFT_COLUMNS, provenance)
