"""Compare two atlases: do the same neurons stand for the same tokens?

    agree[l] = mean_i [ argmax z_a(l, i) = argmax z_b(l, i) ]

per layer and overall, for two models (base and instruct: Davies 2501.02688 reports 75.4 % for Llama 3.1 8B, with each model's own
LM head) or for two sites of one model. Beside it: the overlap of the top k, and chance: the agreement expected if one
model's neurons of a layer were shuffled, Σ_t share_a(t) · share_b(t).

Each atlas is decoded with its own LM head; `decode(b, head_from=a)` gives the variant with a's head for both.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.neurons.atlas import Atlas, wilson
from interp.provenance import Provenance
from interp.results import Column, Result

COMPARE_COLUMNS = (
    Column("layer", "int16", "layer", "0-based layer; -1 for all layers together"),
    Column("n", "int32", "neurons", "neurons compared"),
    Column("agree", "float64", "share", "neurons with the same top-1 token"),
    Column("low", "float64", "share", "lower end of the 95 % Wilson interval of `agree`"),
    Column("high", "float64", "share", "upper end"),
    Column("chance", "float64", "share", "agreement expected if one side's neurons were shuffled within the layer"),
    Column("overlap", "float64", "share", "mean share of top-k tokens in common"),
)


def compare(a: Atlas, b: Atlas, *, sign: int = 1) -> Result:
    """Agreement of two atlases, per layer and overall.

    Args:
        a, b: of two models with the same shape and vocabulary, or of two sites of one model.
        sign: which sign's decoding is compared.

    Returns:
        A `Result` with one row per layer and one (layer −1) for all: n, agree with its 95 % Wilson interval, chance, overlap.

    Raises:
        InputError: the atlases differ in layers, neurons, vocabulary or norm (says which), or lack the sign.
    """
    start = time.perf_counter()
    _check(a, b, sign)
    k = min(a.top_k, b.top_k)
    tops = []
    for atlas in (a, b):
        table = atlas.frame[(atlas.frame["sign"] == sign) & (atlas.frame["rank"] <= k)]
        tops.append(table["token_id"].to_numpy().reshape(-1, k))
    layers = a.frame.loc[(a.frame["sign"] == sign) & (a.frame["rank"] == 1), "layer"].to_numpy()
    same = tops[0][:, 0] == tops[1][:, 0]
    overlap = (tops[0][:, :, None] == tops[1][:, None, :]).any(2).mean(1)
    rows, expected = [], 0.0
    for layer in np.unique(layers):
        at = layers == layer
        chance = _chance(tops[0][at, 0], tops[1][at, 0])
        expected += chance * at.sum()
        rows.append(_row(int(layer), same[at], chance, overlap[at]))
    rows.insert(0, _row(-1, same, expected / len(same), overlap))
    parameters: dict[str, Any] = {"sign": sign, "top_k": k}
    for name, atlas in (("a", a), ("b", b)):
        parameters[name] = {"model": atlas.provenance.model, "fingerprint": atlas.provenance.fingerprint}
        parameters[name] |= {key: atlas.provenance.parameters.get(key) for key in ("site", "norm", "head_from")}
    return Result(
        kind="neurons.compare",
        frame=pd.DataFrame(rows),
        columns=COMPARE_COLUMNS,
        provenance=Provenance.collect(parameters=parameters, wall_time=time.perf_counter() - start),
    )


def _row(layer: int, same: np.ndarray, chance: float, overlap: np.ndarray) -> dict[str, Any]:
    low, high = wilson(int(same.sum()), len(same))
    values = {"agree": float(same.mean()), "low": low, "high": high, "chance": chance, "overlap": float(overlap.mean())}
    return {"layer": layer, "n": len(same), **values}


def _chance(a: np.ndarray, b: np.ndarray) -> float:
    tokens, at = np.unique(np.concatenate([a, b]), return_inverse=True)
    shares = [np.bincount(part, minlength=len(tokens)) / len(part) for part in (at[: len(a)], at[len(a) :])]
    return float(shares[0] @ shares[1])


def _check(a: Atlas, b: Atlas, sign: int) -> None:
    for name, label in (
        ("n_layers", "number of layers"),
        ("layers", "layers decoded"),
        ("d_mlp", "neurons per layer"),
        ("vocab_size", "vocabulary size"),
        ("norm", "norm"),
        ("sample", "sample of neurons"),
        ("seed", "seed of the sample"),
    ):
        ours, theirs = a.provenance.parameters.get(name), b.provenance.parameters.get(name)
        if ours != theirs and not (name == "seed" and a.provenance.parameters.get("sample") is None):
            raise InputError(
                f"the atlases cannot be compared: {label} differs, {ours} in the first and {theirs} in the second"
            )
    for label, atlas in (("first", a), ("second", b)):
        if sign not in atlas.provenance.parameters["signs"]:
            raise InputError(f"the {label} atlas has signs {atlas.provenance.parameters['signs']}, not {sign}")
    _check_vocabularies(a, b)


def _check_vocabularies(a: Atlas, b: Atlas) -> None:
    """Instruct models rename a few reserved tokens; a different tokenizer differs nearly everywhere."""
    texts = [atlas.attachments.get("tokenizer") for atlas in (a, b)]
    if None in texts or texts[0] == texts[1]:
        return
    vocabularies = [_vocabulary(json.loads(str(text))) for text in texts]
    ids = set(vocabularies[0]) | set(vocabularies[1])
    differ = [i for i in sorted(ids) if vocabularies[0].get(i) != vocabularies[1].get(i)]
    if len(differ) > 0.02 * len(ids):
        first = differ[0]
        raise InputError(
            f"the atlases cannot be compared: their vocabularies differ at {len(differ)} of {len(ids)} ids, first at {first} "
            f"({vocabularies[0].get(first)!r} and {vocabularies[1].get(first)!r})"
        )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[int, str]:
    vocab = tokenizer["model"]["vocab"]
    # Unigram models store (piece, score) pairs in the order of their ids.
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    result = {int(i): str(piece) for piece, i in pairs}
    return result | {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens", [])}
