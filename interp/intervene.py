"""Change what neurons and heads do while a model runs: in forward passes and in generation with a KV cache.

1. An intervention (`Clamp`, `HeadAblation`) names a site, the columns of its last dimension, a mode and a value.
2. `intervene` attaches plain torch hooks, one per site, for the length of a `with` block and always removes them, also
   after an exception or Ctrl-C. Blocks nest: outer interventions act first.
3. Where only some positions are meant, a hook on the decoder keeps track of which positions belong to the prompt.

Interventions act in the thread (context) that entered the block and in no other, so that a second thread may use the same
model unclamped. Values may differ per text: a whole dose sweep is one batch.

Sites: "up" (output of the up projection, before the product with the activated gate), "gate" (before the activation),
"hidden" (input of the down projection: the product).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp.architectures import NEURON_SITES
from interp.batching import current_rows, text_count
from interp.errors import InputError
from interp.model import Model

MODES = ("set", "add", "scale", "zero")
POSITIONS = ("all", "prompt", "generated", "last")


@dataclass(frozen=True)
class Clamp:
    """Set, shift, scale or zero one neuron, or several of a layer.

    Attributes:
        layer: 0-based; negative counts from the end.
        neuron: index into d_mlp, or several.
        value: what is set, added or multiplied by, in units of the activation; one number, or one per text of the
            batch (one per entry of `rows` where that is given), each for all neurons. Ignored by "zero".
        site: "up", "gate" or "hidden".
        mode: "set", "add", "scale" or "zero".
        positions: "all" (prompt and generated), "prompt", "generated", or "last": the prompt's last token, from which
            the first new token is predicted.
        rows: the texts it applies to, by index into the list given to `generate` or `run_probes`; in a plain forward
            pass, or Hugging Face's own `generate`, by index into the batch that the model sees. `None` for all.
    """

    layer: int
    neuron: int | Sequence[int]
    value: float | Sequence[float] = 0.0
    site: str = "hidden"
    mode: str = "set"
    positions: str = "all"
    rows: Sequence[int] | None = None


@dataclass(frozen=True)
class HeadAblation:
    """Replace what one attention head hands to the output projection.

    Attributes:
        layer, head: 0-based; negative counts from the end.
        value: `None` for zero, or d_head numbers, for example the head's mean.
        positions, rows: as in `Clamp`.
    """

    layer: int
    head: int
    value: Sequence[float] | None = None
    positions: str = "all"
    rows: Sequence[int] | None = None


@contextlib.contextmanager
def clamp(
    model: Model,
    *,
    layer: int,
    neuron: int | Sequence[int],
    value: float | Sequence[float] = 0.0,
    site: str = "hidden",
    mode: str = "set",
    positions: str = "all",
) -> Iterator[Model]:
    """Clamp one neuron, or several of a layer, inside a `with` block. Arguments as in `Clamp`.

    Example:
        >>> with clamp(model, layer=27, neuron=1510, value=-10):       # doctest: +SKIP
        ...     model.generate("What is your favourite animal?", chat=True)
    """
    with intervene(model, Clamp(layer, neuron, value, site, mode, positions)):
        yield model


@contextlib.contextmanager
def intervene(model: Model, *interventions: Clamp | HeadAblation) -> Iterator[Model]:
    """Apply interventions inside a `with` block; those of one site act in the order given.

    Args:
        model: what `load_model` gave.
        interventions: any number of `Clamp` and `HeadAblation`.

    Yields:
        The model.

    Raises:
        InputError: on entering: layer, neuron, head, site, mode, positions or value out of range. While running: one
            value per text was given, but there is another number of texts; or a row of `rows` is none of them.
    """
    edits = [_edit(model, intervention) for intervention in interventions]
    scope = _Scope()
    token = _active.set(_active.get() | {scope})
    try:
        with contextlib.ExitStack() as stack:
            if any(edit.positions != "all" for edit in edits):
                decoder = model.hf.base_model
                handle = decoder.register_forward_pre_hook(scope.before_forward, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            for site, layer in dict.fromkeys((edit.site, edit.layer) for edit in edits):
                here = [edit for edit in edits if (edit.site, edit.layer) == (site, layer)]
                stack.callback(model.arch.site(site, layer).attach(scope.visitor(here)).remove)
            yield model
    finally:
        _active.reset(token)


class _Scope:
    """One `with` block: which positions of the running forward pass are prompt, and how edits are applied.

    A forward pass either begins a prompt or continues generation; a block may hold any number of both. It continues if it
    goes on where the pass before it ended: with the same KV cache, or without one as `generate(use_cache=False)` does.
    """

    def __init__(self) -> None:
        self.start = 0  # position of the first column of this forward pass
        self.end = 0  # position after its last column
        self.prompt = 0  # length of the prompt, padding included
        self.last: Tensor | None = None  # (batch,) position of each prompt's last token
        self.last_of_all = -1
        self.ids: Tensor | None = None  # the prompt's token ids
        self.cache: weakref.ref | None = None
        self.texts: tuple[int, ...] | None = None

    def before_forward(self, module: Any, args: tuple, kwargs: dict) -> None:
        if self not in _active.get():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        end = past + given.shape[1]
        if not self._continues(ids, given, cache, past, kwargs):
            # With a cache that was filled before, this is the rest of the prompt.
            self._new_prompt(end, kwargs, given)
            self.ids = ids
        self.start, self.end, self.texts = past, end, current_rows.get()
        self.cache = None if cache is None else weakref.ref(cache)

    def _continues(self, ids: Tensor | None, given: Tensor, cache: Any, past: int, kwargs: dict) -> bool:
        # `for_each_batch` makes a tuple per batch: another tuple is another batch, whatever its tokens.
        if self.last is None or given.shape[0] != len(self.last) or current_rows.get() is not self.texts:
            return False
        if past:
            return past == self.end if self.cache is None else self.cache() is cache
        # generate(use_cache=False) feeds the whole text again, one token longer each time, and positions with it.
        again = kwargs.get("use_cache") is False and kwargs.get("position_ids") is not None
        if not again or ids is None or self.ids is None or self.start != 0 or ids.shape[1] != self.end + 1:
            return False
        return torch.equal(ids[:, : self.prompt], self.ids)

    def _new_prompt(self, length: int, kwargs: dict, given: Tensor) -> None:
        self.prompt = length
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length:
            steps = torch.arange(length, device=mask.device)
            self.last = (mask.long() * (steps + 1)).amax(1) - 1
        else:
            self.last = torch.full((given.shape[0],), length - 1, device=given.device)
        self.last_of_all = int(self.last.max())

    def visitor(self, edits: list[_Edit]) -> Any:
        def visit(tensor: Tensor) -> Tensor | None:
            if self not in _active.get():
                return None
            # In place where autograd does not need the old values; a site's tensor belongs to the running layer alone.
            new = tensor.clone() if tensor.requires_grad and torch.is_grad_enabled() else tensor
            for edit in edits:
                self._apply(edit, new)
            return None if new is tensor else new

        return visit

    def _apply(self, edit: _Edit, tensor: Tensor) -> None:
        size, width = tensor.shape[0], tensor.shape[1]
        if edit.positions == "last":
            if self.last is None or self.last_of_all < self.start:
                return
            rows = edit.batch_rows(size, tensor.device)
            at = self.last.to(tensor.device)[rows] - self.start
            inside = (at >= 0) & (at < width)
            if inside.any():
                chosen = (rows[inside, None], at[inside, None], edit.columns_on(tensor.device)[None])
                edit.change(tensor, chosen, edit.values(tensor, rows[inside], 2))
            return
        split = min(max(self.prompt - self.start, 0), width)
        span = {"all": slice(0, width), "prompt": slice(0, split), "generated": slice(split, width)}[edit.positions]
        if span.start == span.stop:
            return
        if edit.rows is None and not edit.per_row:
            columns = edit.columns[0] if len(edit.columns) == 1 else edit.columns_on(tensor.device)
            edit.change(tensor, (slice(None), span, columns), edit.constant(tensor))
            return
        rows = edit.batch_rows(size, tensor.device)
        if len(rows):
            steps = torch.arange(span.start, span.stop, device=tensor.device)
            chosen = (rows[:, None, None], steps[None, :, None], edit.columns_on(tensor.device)[None, None])
            edit.change(tensor, chosen, edit.values(tensor, rows, 3))


# Scopes that act in this thread (context).
_active: ContextVar[frozenset[_Scope]] = ContextVar("active_interventions", default=frozenset())


@dataclass
class _Edit:
    """An intervention with indices checked: `columns` of a site's last dimension get `value`."""

    site: str
    layer: int
    columns: list[int]
    mode: str
    value: list[float]  # one number, one per text, or one per column (`by_column`)
    positions: str
    rows: list[int] | None
    per_row: bool
    _tensors: dict[Any, Tensor] = field(default_factory=dict)

    def columns_on(self, device: torch.device) -> Tensor:
        return self._kept(("columns", device), lambda: torch.tensor(self.columns, device=device))

    def constant(self, tensor: Tensor) -> Any:
        if len(self.value) == 1:
            return self.value[0]
        key = ("constant", tensor.device, tensor.dtype)
        return self._kept(key, lambda: torch.tensor(self.value, device=tensor.device, dtype=tensor.dtype))

    def _kept(self, key: Any, make: Any) -> Tensor:
        if key not in self._tensors:
            self._tensors[key] = make()
        return self._tensors[key]

    def batch_rows(self, size: int, device: torch.device) -> Tensor:
        """The rows of the running batch that the edit applies to."""
        texts, count = _texts(size)

        def make() -> Tensor:
            if self.per_row and self.rows is None and len(self.value) != count:
                raise InputError(f"{len(self.value)} clamp values were given for {count} texts; give one per text")
            lost = [row for row in self.rows or () if not 0 <= row < count]
            if lost:
                raise InputError(f"row {lost[0]} is out of range: there are {count} texts (0 … {count - 1})")
            wanted = range(count) if self.rows is None else set(self.rows)
            here = [row for row, text in enumerate(texts) if text in wanted]
            return torch.tensor(here, dtype=torch.long, device=device)

        return self._kept(("rows", device, texts, count), make)

    def values(self, tensor: Tensor, rows: Tensor, dims: int) -> Any:
        """What the edit writes into `rows`, to be broadcast over `dims` dimensions."""
        if not self.per_row:
            return self.constant(tensor)
        texts, _ = _texts(tensor.shape[0])

        def make() -> Tensor:
            given = dict(enumerate(self.value)) if self.rows is None else dict(zip(self.rows, self.value, strict=True))
            numbers = [given[texts[row]] for row in rows.tolist()]
            return torch.tensor(numbers, device=tensor.device, dtype=tensor.dtype).reshape((-1,) + (1,) * (dims - 1))

        # "last" (two index dimensions) meets other rows from one forward pass to the next.
        return make() if dims == 2 else self._kept(("values", tensor.device, tensor.dtype, texts), make)

    def change(self, tensor: Tensor, at: Any, value: Any) -> None:
        if self.mode in ("set", "zero"):
            tensor[at] = value
        elif self.mode == "add":
            tensor[at] += value
        else:
            tensor[at] *= value


def _texts(size: int) -> tuple[tuple[int, ...], int]:
    """The caller's index of each row of the running batch, and how many texts the caller has in all.

    Beam search and several samples per prompt repeat each text.
    """
    rows, count = current_rows.get(), text_count.get()
    if rows is None or count is None or size % len(rows):
        return tuple(range(size)), size
    return tuple(text for text in rows for _ in range(size // len(rows))), count


def _edit(model: Model, given: Clamp | HeadAblation) -> _Edit:
    arch = model.arch
    if given.positions not in POSITIONS:
        raise InputError(f"positions={given.positions!r}; expected one of {', '.join(POSITIONS)}")
    rows = None if given.rows is None else [int(row) for row in _several(given.rows)]
    layer = arch.check_layer(given.layer)
    if isinstance(given, HeadAblation):
        head = arch.check_head(given.head)
        columns = list(range(head * arch.d_head, (head + 1) * arch.d_head))
        value = [0.0] if given.value is None else _numbers(model, given.value)
        if len(value) not in (1, arch.d_head):
            raise InputError(f"a head's value has {len(value)} numbers; expected d_head={arch.d_head}")
        return _Edit("z", layer, columns, "set", value, given.positions, rows, per_row=False)
    if given.site not in NEURON_SITES:
        raise InputError(f"site {given.site!r} cannot be clamped; expected one of {', '.join(NEURON_SITES)}")
    if given.mode not in MODES:
        raise InputError(f"mode={given.mode!r}; expected one of {', '.join(MODES)}")
    arch.site(given.site, layer)  # says so where the family has no gate
    columns = [arch.check_neuron(neuron) for neuron in _several(given.neuron)]
    if not columns:
        raise InputError("no neuron was given; expected at least one index")
    value = [0.0] if given.mode == "zero" else _numbers(model, given.value)
    per_row = given.mode != "zero" and not _is_number(given.value)
    if per_row and rows is not None and len(rows) != len(value):
        raise InputError(f"{len(value)} clamp values were given for {len(rows)} rows; give one per row")
    return _Edit(given.site, layer, columns, given.mode, value, given.positions, rows, per_row)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "ndim") and value.ndim == 0)


def _several(given: Any) -> list[Any]:
    return [given] if _is_number(given) else list(given)


def _numbers(model: Model, value: Any) -> list[float]:
    numbers = [float(number) for number in _several(value)]
    limit = torch.finfo(model.dtype).max
    for number in numbers:
        if not math.isfinite(number) or abs(number) > limit:
            raise InputError(f"clamp value {number} is not a finite {model.dtype} number")
    return numbers
