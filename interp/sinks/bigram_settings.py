"""Settings of a toy run: everything that decides it, but for its seed, device and dtype.

Guo et al. 2024 (arXiv 2410.13835), section 2.

- "paper" has the published settings: about a day on two processors, minutes on a GPU.
- "laptop" was found by experiment: about a minute per block on one core, and every phase shows. It is narrower, shorter
and takes fewer
  sequences per step, so its learning rate is higher, and falls to 0 at the end, so that what is read off at the last
  step is not the noise of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from interp.errors import InputError
from interp.sinks.bigram_backcopy import BigramBackcopy
from interp.sinks.bigram_model import ToyShape


@dataclass(frozen=True)
class ToySettings:
    """Everything that decides a run, but for its seed, device and dtype.

    Attributes:
        blocks: the model's, each "both", "attention" or "mlp".
        width, n_heads, attention, start_norm, see_start: see `ToyShape`.
        length: input positions.
        n_triggers, start: see `BigramBackcopy`.
        optimizer: "adamw" or "sgd".
        adamw_rate, sgd_rate: learning rates, constant but for the next two.
        warmup: first steps, over which the rate rises to its value.
        cooldown: last steps, over which it falls to 0; at most half of the run.
        beta2: AdamW's second; the first is 0.9, as is SGD's momentum.
        weight_decay: of either.
        batch: sequences per step.
        steps: optimizer steps.
        sample: sequences that are measured.

    Raises:
        InputError: an optimizer that is not one of those, or a number that makes no sense.
    """

    blocks: tuple[str, ...] = ("both",)
    width: int = 256
    n_heads: int = 1
    length: int = 256
    attention: str = "softmax"
    start_norm: float | None = None
    see_start: bool = True
    n_triggers: int = 3
    start: bool = True
    optimizer: str = "adamw"
    adamw_rate: float = 3e-4
    sgd_rate: float = 0.03
    warmup: int = 0
    cooldown: int = 0
    beta2: float = 0.99
    weight_decay: float = 1e-4
    batch: int = 512
    steps: int = 10_000
    sample: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.optimizer not in ("adamw", "sgd"):
            raise InputError(f"optimizer={self.optimizer!r}; expected 'adamw' or 'sgd'")
        for name, least in (("batch", 1), ("steps", 1), ("sample", 1), ("length", 3), ("warmup", 0), ("cooldown", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}; expected a whole number of at least {least}")
        for name in ("adamw_rate", "sgd_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r}; expected a learning rate above 0")

    @property
    def task(self) -> BigramBackcopy:
        """What is learned."""
        return BigramBackcopy(self.n_triggers, self.start)

    @property
    def shape(self) -> ToyShape:
        """What learns it."""
        names = [one.name for one in fields(ToyShape) if one.name != "vocabulary"]
        return ToyShape(vocabulary=self.task.vocabulary, **{name: getattr(self, name) for name in names})


PRESETS = {
    "paper": ToySettings(),
    "laptop": ToySettings(
        width=64, length=64, batch=64, steps=1500, adamw_rate=2e-3, sgd_rate=0.1, cooldown=400, sample=64
    ),
}


def toy_settings(preset: str = "laptop", *, layers: int | None = None, **changes: Any) -> ToySettings:
    """A preset with some fields changed.

    Raises:
        InputError: an unknown preset or field, or `layers` together with `blocks`.

    Example:
        >>> toy_settings("laptop", layers=3).blocks
        ('both', 'both', 'both')
    """
    if preset not in PRESETS:
        raise InputError(f"preset={preset!r}; expected one of {', '.join(PRESETS)}")
    unknown = changes.keys() - {one.name for one in fields(ToySettings)}
    if unknown:
        known = ", ".join(one.name for one in fields(ToySettings))
        raise InputError(f"unknown settings {', '.join(sorted(unknown))}; expected some of {known}")
    if layers is not None:
        if "blocks" in changes or isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise InputError(f"layers={layers!r}; expected a whole number of at least 1, and not together with blocks")
        changes["blocks"] = ("both",) * layers
    settings = replace(PRESETS[preset], **changes)
    _ = settings.shape, settings.task  # they check their own values
    return settings
