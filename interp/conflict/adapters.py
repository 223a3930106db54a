"""Adapters on disk: in peft's format, with a note of the model they belong to, and on a model for as long as they are needed.

    folder/
    ├── adapter_config.json, adapter_model.safetensors      peft's own; peft and transformers load them
    └── interp_provenance.json                              the base model's fingerprint, how it was trained, versions

1. `save_adapter` writes the folder whole or not at all.
2. `load_adapter` gives a new `Model`: a copy of the base with the adapter merged into its weights, or beside them.
3. `adapted` puts the adapter on the base itself inside a `with` block. Merged, the weights are changed and afterwards written
   back from a copy, so that what reads weights sees the adapter as what reads activations does.

All refuse an adapter that was made for another model: its matrices would fit any model of the same size, and mean nothing there.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from interp.atomic import replace_folder
from interp.errors import InputError, ModelError, ResourceError
from interp.model import Model

WEIGHTS, CONFIG, PROVENANCE = "adapter_model.safetensors", "adapter_config.json", "interp_provenance.json"


def require_peft() -> None:
    """Refuses to go on without the optional libraries.

    Raises:
        ResourceError: with the command that installs them.
    """
    from importlib.util import find_spec

    missing = [name for name in ("peft", "trl") if find_spec(name) is None]
    if missing:
        raise ResourceError(f"aligning needs {' and '.join(missing)}: pip install 'interp[align]'")


def save_adapter(peft_model: Any, folder: str | Path, provenance: Mapping[str, Any]) -> Path:
    """Write a peft model's adapter and where it came from.

    Args:
        peft_model: as peft made it.
        folder: made or replaced.
        provenance: JSON values; "fingerprint" and "model" say what it belongs to.

    Raises:
        ResourceError: it cannot be written.
    """

    def fill(workspace: Path) -> None:
        # Not "auto": peft would ask a hub whether the vocabulary was resized.
        peft_model.save_pretrained(str(workspace), save_embedding_layers=False)
        (workspace / "README.md").unlink(missing_ok=True)  # a form to be filled in
        text = json.dumps(dict(provenance), indent=1, sort_keys=True) + "\n"
        (workspace / PROVENANCE).write_text(text, encoding="utf-8")

    return replace_folder(folder, fill)


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """What `save_adapter` wrote about an adapter; empty where another program made it.

    Raises:
        ModelError: no adapter in peft's format with safetensors weights, or a damaged note.
    """
    folder = Path(folder)
    lost = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lost:
        raise ModelError(
            f"{folder} has no {lost[0]}; expected a folder with {CONFIG} and {WEIGHTS} as align, or peft, writes it"
        )
    if not (folder / PROVENANCE).exists():
        return {}
    try:
        read = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder / PROVENANCE} is damaged ({error}); align again, or remove it and give check=False"
        ) from error
    if not isinstance(read, dict):
        raise ModelError(
            f"{folder / PROVENANCE} is damaged (no object); align again, or remove it and give check=False"
        )
    return read


def load_adapter(model: Model, folder: str | Path, *, merged: bool = True, check: bool = True) -> Model:
    """A copy of the base with an adapter.

    Args:
        model: the base; it stays as it is.
        folder: of an adapter in peft's format.
        merged: add the adapter to the copy's weights, which everything in interp can then read; otherwise it runs beside them
            (and what reads weights sees the base).
        check: refuse an adapter of another base.

    Raises:
        InputError: it belongs to another model, or, if it is checked, does not say to which.
        ModelError: not an adapter in peft's format, or one that does not fit.

    Example:
        >>> after = load_adapter(load_model(), "run/adapter")                              # doctest: +SKIP
    """
    require_peft()
    check_adapter(model, folder, check=check)
    hf = copy.deepcopy(model.hf)
    with_adapter = _on(hf, folder)
    hf = with_adapter.merge_and_unload() if merged else with_adapter.get_base_model()
    return Model(hf.requires_grad_(False).eval(), model.tokenizer, f"{model.name}+{Path(folder).name}")


@contextlib.contextmanager
def adapted(model: Model, folder: str | Path, *, merged: bool = True, check: bool = True) -> Iterator[Model]:
    """Inside the block, the model itself has the adapter; afterwards it is as it was, to the bit.

    Args as `load_adapter`.

    Yields:
        The same model. Its fingerprint inside the block is that of the adapted weights.

    Raises:
        InputError, ModelError: as `load_adapter`.

    Example:
        >>> with adapted(model, "run/adapter"):                                            # doctest: +SKIP
        ...     model.generate("What is rain?", chat=True)
    """
    require_peft()
    check_adapter(model, folder, check=check)
    with left_as_it_was(model):
        targets = _on(model.hf, folder)
        originals: list[tuple[Any, Any]] = []
        try:
            if merged:
                layers = [module for module in model.hf.modules() if hasattr(module, "get_base_layer")]
                originals = [
                    (parameter, parameter.detach().clone())
                    for layer in layers
                    for parameter in layer.get_base_layer().parameters()
                ]
                if any(value.is_meta or not value.is_floating_point() for _, value in originals):
                    raise InputError(
                        f"weights of {model.name} are offloaded or quantised, and could not be written back: give merged=False"
                    )
                targets.merge_and_unload()
            model.hf.eval()
            yield model
        finally:
            with torch.no_grad():
                for parameter, value in originals:
                    parameter.copy_(value)


def check_adapter(model: Model, folder: str | Path, *, check: bool = True) -> dict[str, Any]:
    """What is known of an adapter, if it belongs to the model.

    Raises:
        InputError: it belongs to another model, or does not say to which.
        ModelError: not an adapter.
    """
    known = read_adapter(folder)
    if not check:
        return known
    if not known.get("fingerprint"):
        raise InputError(
            f"{folder} does not say which model it belongs to (no {PROVENANCE}); if you know, give check=False"
        )
    if known["fingerprint"] != model.fingerprint:
        raise InputError(
            f"{folder} is an adapter for another model: {known.get('model')!r} ({known.get('dtype')}, fingerprint "
            f"{known['fingerprint']}), and this is {model.name!r} ({str(model.dtype).removeprefix('torch.')}, fingerprint "
            f"{model.fingerprint}); load that model in that dtype, or give check=False if only the dtype differs"
        )
    return known


@contextlib.contextmanager
def left_as_it_was(model: Model) -> Iterator[None]:
    """Whatever the block puts on the module in place, adapters, patched forwards, flags, config entries, goes afterwards.

    Weights are not copied: the block must not change them.
    """
    hf = model.hf
    configs = {id(config): config for config in (hf.config, model.arch.config, getattr(hf, "generation_config", None))}
    entries = [(config, dict(vars(config))) for config in configs.values() if config is not None]
    attributes = dict(vars(hf))
    children = [(module, dict(module._modules), module.training) for module in hf.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in hf.parameters()]
    dropouts = [(module, module.p) for module in hf.modules() if isinstance(module, torch.nn.Dropout)]
    fingerprint = vars(model).pop("fingerprint", None)
    try:
        yield
    finally:
        for module, parts, training in children:
            module._modules.clear()
            module._modules.update(parts)
            module.training = training
        for name in [name for name in vars(hf) if name not in attributes]:
            del vars(hf)[name]
        vars(hf).update(attributes)
        for config, values in entries:
            vars(config).clear()
            vars(config).update(values)
        for parameter, needs in flags:
            parameter.requires_grad_(needs)
            parameter.grad = None
        for dropout, probability in dropouts:
            dropout.p = probability
        vars(model).pop("fingerprint", None)
        if fingerprint is not None:
            vars(model)["fingerprint"] = fingerprint


def _on(hf: Any, folder: str | Path) -> Any:
    """A peft model around the module, with the adapter on it."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # peft reads an old name
            return PeftModel.from_pretrained(hf, str(folder), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{folder} does not fit {type(hf).__name__} ({reason}); give the model that it was made for"
        ) from error
