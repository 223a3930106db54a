"""Which neurons are clamped, and to what: a concept's candidates, random controls, and doses in standard deviations.

A dose of d stands for the value mean + d · sd (mode "set") or d · sd (mode "add") of the neuron's own activation over a
text sample, so that one dose means the same for neurons whose activations differ in size by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.errors import InputError
from interp.model import Model
from interp.neurons.atlas import Atlas
from interp.neurons.concepts import Concept
from interp.neurons.decoding import decode
from interp.neurons.statistics import neuron_statistics
from interp.results import Result

DECODED_SITE = {"up": "up", "gate": "gate", "hidden": "down"}  # which weights speak for a site


def candidates(
    model: Model, concept: Concept, site: str, top: int, atlas: Atlas | None = None, progress: bool | str = False
) -> pd.DataFrame:
    """The neurons of a site that decode to a concept, best first: rows of `Atlas.find`, each neuron once; maybe none.

    Raises:
        InputError: the atlas is of another site or size.
    """
    weights = DECODED_SITE[site]
    if atlas is None:
        atlas = decode(model, site=weights, progress=progress)
    given = {name: atlas.provenance.parameters.get(name) for name in ("site", "n_layers", "d_mlp", "vocab_size")}
    arch = model.arch
    fits = {"site": weights, "n_layers": arch.n_layers, "d_mlp": arch.d_mlp, "vocab_size": arch.vocab_size}
    if given != fits:
        raise InputError(f"the atlas has {given}; to clamp {site!r} neurons of {model.name} it needs {fits}")
    # Both signs of a neuron are one candidate, with its better one.
    return atlas.find(concept, top=2 * top).drop_duplicates(["layer", "neuron"]).head(top)


def no_candidate(concept: Concept, sites: Sequence[str]) -> InputError:
    """The error that no neuron decodes to a concept."""
    names = " or ".join(sites)
    return InputError(
        f"no neuron of site {names} has {concept.name!r} among its best decoded tokens; give another concept, or decode "
        f"with a larger top_k"
    )


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of neurons, in which doses are given.

    Attributes:
        layers: {(site, layer): frame indexed by neuron with mean and sd}.
        source: where they come from: "statistics", "sample_texts" or "prompts".
    """

    layers: dict[tuple[str, int], pd.DataFrame]
    source: str

    @classmethod
    def of(
        cls,
        model: Model,
        sites: str | Sequence[str],
        layers: Sequence[int],
        statistics: Result | None,
        sample_texts: Sequence[str] | None,
        prompts: Sequence[str],
        chat: bool,
        progress: bool | str = False,
    ) -> Scale:
        """From a `neuron_statistics` result, else from texts, else from the prompts themselves.

        Raises:
            InputError: the result is of another kind, model size, site or layer.
        """
        sites = [sites] if isinstance(sites, str) else list(sites)
        source = "statistics"
        if statistics is None:
            source = "prompts" if sample_texts is None else "sample_texts"
            texts = prompts if sample_texts is None else sample_texts
            wrapped = chat and sample_texts is None
            statistics = neuron_statistics(model, texts, sites, layers, chat=wrapped, progress=progress)
        if statistics.kind != "neurons.statistics":
            raise InputError(
                f"statistics is a result of kind {statistics.kind!r}; expected what neuron_statistics gives"
            )
        if statistics.provenance.fingerprint != model.fingerprint:
            raise InputError(
                f"statistics are of another model ({statistics.provenance.model}); compute them with this one"
            )
        table = statistics.frame
        found = {}
        for site in sites:
            for layer in layers:
                rows = table[(table["site"] == site) & (table["layer"] == layer)]
                if len(rows) != model.arch.d_mlp:
                    raise InputError(
                        f"statistics hold {len(rows)} neurons of site {site!r}, layer {layer}; expected {model.arch.d_mlp}"
                    )
                found[site, layer] = rows.set_index("neuron")[["mean", "sd"]]
        return cls(found, source)

    def mean(self, site: str, layer: int, neuron: int) -> float:
        """Mean activation."""
        return float(self.layers[site, layer].at[neuron, "mean"])  # type: ignore[arg-type]

    def sd(self, site: str, layer: int, neuron: int) -> float:
        """Standard deviation of the activation."""
        return float(self.layers[site, layer].at[neuron, "sd"])  # type: ignore[arg-type]

    def value(self, site: str, layer: int, neuron: int, dose: float, mode: str = "set") -> float:
        """The clamp's value for a dose in standard deviations."""
        shift = dose * self.sd(site, layer, neuron)
        return shift + self.mean(site, layer, neuron) if mode == "set" else shift

    def check(self, site: str, layer: int, neuron: int) -> None:
        """Refuse a neuron that does not vary.

        Raises:
            InputError: its sd is 0 or unknown.
        """
        if not self.sd(site, layer, neuron) > 0:
            raise InputError(
                f"neuron ({layer}, {neuron}) never varies at {site!r} over the {self.source}, so a dose in sd means nothing; "
                f"give more texts or units='absolute'"
            )


def random_neurons(
    model: Model, scale: Scale | None, site: str, layer: int, taken: Sequence[int], count: int, seed: int
) -> list[int]:
    """Neurons of a layer drawn at random, other than `taken` and than those that never vary.

    Raises:
        InputError: there are fewer than `count`.
    """
    free = np.ones(model.arch.d_mlp, dtype=bool)
    free[list(taken)] = False
    if scale is not None:
        free &= scale.layers[site, layer]["sd"].to_numpy() > 0
    pool = np.flatnonzero(free)
    if len(pool) < count:
        raise InputError(f"{count} random neurons were asked for, but layer {layer} has {len(pool)} that can be drawn")
    return sorted(np.random.default_rng([seed, layer]).choice(pool, count, replace=False).tolist())
