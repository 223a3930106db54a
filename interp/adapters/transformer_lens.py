"""The same model in TransformerLens, and back: `TransformerBridge` (TransformerLens 4).

    bridge = to_transformer_lens(model)                             # a copy; the engine's model stays as it is
    _, cache = bridge.run_with_cache(ids, names_filter=[hook_name("hidden", 3)], return_cache_object=False)
    with bridge.hooks(fwd_hooks=clamp_hooks(Clamp(27, 1510, -10))):
        bridge.generate(ids, max_new_tokens=40, do_sample=False, return_type="tokens", verbose=False)
    model = interp.load_model(bridge)                               # the engine on the bridge's weights

1. A bridge rewires the module that it wraps: every part is replaced by a component of its own, so that `state_dict` keys
   change, `save_pretrained` raises, and attention is switched to eager. `to_transformer_lens` therefore works on a copy.
2. `unwrap` goes the other way without touching the bridge: it builds the plain module from the config on the meta device
   and hands it the bridge's own parameter and buffer objects, found by walking the rewired tree through each component's
   `original_component`. Nothing is copied; both read the same memory. A few tokens through both show that they agree.
3. Where interp's sites live: `hook_name`.

       site       hook in block l (blocks.l.…)      shape
       resid_pre  hook_in                           (batch, position, d_model)
       z          attn.o.hook_in                    (batch, position, head, d_head): interp joins the last two
       pattern    attn.hook_pattern                 (batch, head, query, key)
       attn_out   attn.hook_out                     (batch, position, d_model)
       gate       mlp.hook_pre                      (batch, position, d_mlp), before the activation; gated families only
       up         mlp.hook_pre_linear; mlp.hook_pre where there is no gate
       hidden     mlp.hook_post (= mlp.out.hook_in)
       mlp_out    mlp.hook_out                      (batch, position, d_model)
       resid_post hook_out                          (batch, position, d_model)
       logits     unembed.hook_out, in no block     (batch, position, vocab), before Gemma 2's soft cap, which interp's
                                                    site includes, as do the logits that the bridge returns
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.errors import InputError, ModelError

if TYPE_CHECKING:
    from interp.intervene import Clamp
    from interp.model import Model

_HOOKS = {
    "resid_pre": "hook_in",
    "resid_post": "hook_out",
    "attn_out": "attn.hook_out",
    "pattern": "attn.hook_pattern",
    "z": "attn.o.hook_in",
    "gate": "mlp.hook_pre",
    "hidden": "mlp.hook_post",
    "mlp_out": "mlp.hook_out",
}


def hook_name(site: str, layer: int = -1, gated: bool = True) -> str:
    """TransformerLens' name for one of interp's sites, for decoders.

    Args:
        site: "resid_pre", "resid_post", "attn_out", "pattern", "z", "up", "gate", "hidden", "mlp_out" or "logits".
        layer: 0-based; ignored for "logits".
        gated: whether the family's MLP has a gate (`model.arch.family.gate is not None`, `bridge.cfg.gated_mlp`).

    Raises:
        InputError: an unknown site, a negative layer, or the gate of an MLP without one.

    Example:
        >>> hook_name("gate", 3), hook_name("up", 3), hook_name("up", 3, gated=False)
        ('blocks.3.mlp.hook_pre', 'blocks.3.mlp.hook_pre_linear', 'blocks.3.mlp.hook_pre')
    """
    if site == "logits":
        return "unembed.hook_out"
    if site == "gate" and not gated:
        raise InputError("the model's MLP has no gate; use site 'up' or 'hidden'")
    hook = ("mlp.hook_pre_linear" if gated else "mlp.hook_pre") if site == "up" else _HOOKS.get(site)
    if hook is None:
        raise InputError(f"unknown site {site!r}; expected one of {', '.join((*_HOOKS, 'up', 'logits'))}")
    if layer < 0:
        raise InputError(f"layer {layer} is negative; TransformerLens names layers from 0")
    return f"blocks.{layer}.{hook}"


def clamp_hooks(clamp: Clamp, gated: bool = True) -> list[tuple[str, Callable[..., Tensor]]]:
    """A clamp as forward hooks, for `bridge.hooks(fwd_hooks=…)` or `bridge.run_with_hooks(…, fwd_hooks=…)`.

    Args:
        clamp: layer and neurons counted from 0, `positions="all"`; `value` may be one number per text of the batch.
        gated: as in `hook_name`.

    Returns:
        One `(hook name, function)` pair.

    Raises:
        InputError: a negative layer or neuron, a site that is no neuron, an unknown mode, or other positions than
            "all": a hook does not know which positions are the prompt's. `interp.clamp` does all of that.

    Example:
        >>> from interp.intervene import Clamp
        >>> [(name, edit)] = clamp_hooks(Clamp(layer=2, neuron=[0, 3], value=5.0))
        >>> name, edit(torch.zeros(1, 1, 4)).tolist()
        ('blocks.2.mlp.hook_post', [[[5.0, 0.0, 0.0, 5.0]]])
    """
    if clamp.site not in ("up", "gate", "hidden"):
        raise InputError(f"site {clamp.site!r} cannot be clamped; expected one of up, gate, hidden")
    if clamp.mode not in ("set", "add", "scale", "zero"):
        raise InputError(f"mode={clamp.mode!r}; expected one of set, add, scale, zero")
    if clamp.positions != "all":
        raise InputError(f"positions={clamp.positions!r} is not possible in a TransformerLens hook; use interp.clamp")
    neurons = torch.as_tensor(clamp.neuron).reshape(-1)
    if neurons.is_floating_point() or neurons.numel() == 0 or neurons.min() < 0:
        raise InputError(f"neuron={clamp.neuron!r}; expected one index or several, counted from 0")
    values = torch.as_tensor(0.0 if clamp.mode == "zero" else clamp.value, dtype=torch.float64)
    if not torch.isfinite(values).all():
        raise InputError(f"value={clamp.value!r}; expected finite numbers")

    def edit(tensor: Tensor, hook: Any = None) -> Tensor:
        rows = list(range(tensor.shape[0])) if clamp.rows is None else [int(row) for row in clamp.rows]
        value = values.to(tensor)
        if value.dim():
            if len(value) != len(rows):
                raise InputError(f"{len(value)} clamp values were given for {len(rows)} texts; give one per text")
            value = value[:, None, None]
        new = tensor.clone()
        at = (torch.tensor(rows)[:, None], slice(None), neurons[None])  # separated by a slice: (row, neuron, position)
        if clamp.mode == "add":
            new[at] += value
        elif clamp.mode == "scale":
            new[at] *= value
        else:
            new[at] = value
        return new

    return [(hook_name(clamp.site, clamp.layer, gated), edit)]


def to_transformer_lens(model: Model, *, copy: bool = True) -> Any:
    """A `TransformerBridge` of a model: raw weights, no folding or centering, attention switched to eager.

    Text gets the same token ids as from `model.encode`: `cfg.default_prepend_bos` follows the tokenizer, where
    TransformerLens would by default prepend a begin token.

    Args:
        model: what `load_model` gave. Its tokenizer is copied, because TransformerLens changes its settings.
        copy: wrap a copy of `model.hf`, weights included. With `copy=False` the module itself is wrapped and thereby
            REWIRED: `model` can no longer be used, its `state_dict` keys change and `save_pretrained` raises. That saves
            the memory of a second set of weights.

    Raises:
        ModelError: TransformerLens knows no such architecture.

    Example:
        >>> bridge = to_transformer_lens(model)                                                   # doctest: +SKIP
        >>> _, cache = bridge.run_with_cache("The water", names_filter=["blocks.3.mlp.hook_post"])  # doctest: +SKIP
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = copying.deepcopy(model.hf) if copy else model.hf
    named = getattr(hf.config, "architectures", None)
    hf.config.architectures = named or [type(hf).__name__]
    tokenizer = copying.deepcopy(model.tokenizer)
    options: dict[str, Any] = {"device": str(model.device), "dtype": model.dtype}
    try:
        if tokenizer is None:  # boot_transformers would look for one by the model's name
            hf.set_attn_implementation("eager")
            architecture = hf.config.architectures[0]
            config = copying.deepcopy(hf.config)
            return build_bridge_from_module(hf, architecture, hf_config=config, model_name=model.name, **options)
        # Without these two TransformerLens loads the tokenizer again, by its path or from the hub.
        tokenizer.init_kwargs.setdefault("name_or_path", model.name)
        tokenizer.init_kwargs["add_bos_token"] = True
        bridge = TransformerBridge.boot_transformers(model.name, hf_model=hf, tokenizer=tokenizer, **options)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"TransformerLens cannot wrap {type(hf).__name__} ({model.name}): {error}") from error
    finally:
        hf.config.architectures = named
    bridge.cfg.default_prepend_bos = bridge.cfg.tokenizer_prepends_bos
    return bridge


def unwrap(source: Any) -> tuple[nn.Module, Any]:
    """The plain Hugging Face module of a bridge, and its tokenizer; the bridge stays as it is.

    Parameters and buffers are the bridge's own objects: no memory is used, and a weight changed in place changes in both.
    Attention stays eager, as the bridge runs it; `load_model(bridge, attention="sdpa")` is faster. Six tokens are run
    through both, hooks on the bridge included.

    Args:
        source: a `TransformerBridge`.

    Returns:
        The module, newly built, and the bridge's tokenizer (or `None`).

    Raises:
        ModelError: its weights were processed (`enable_compatibility_mode()`, `process_weights()`), it wraps no Hugging
            Face module, or the two disagree.
    """
    try:
        wired = source.original_model
    except AttributeError as error:
        raise ModelError(f"{type(source).__name__} wraps no torch module here; expected a TransformerBridge") from error
    if getattr(source, "_weights_processed", False):
        raise ModelError(
            "the bridge's weights were processed (layer norms folded, weights centred), so they are no longer the "
            "model's; give a bridge from boot_transformers without process_weights() or enable_compatibility_mode(), or "
            "with enable_compatibility_mode(no_processing=True)"
        )
    if not hasattr(wired, "config") or not hasattr(wired, "set_attn_implementation"):
        raise ModelError(f"the bridge wraps a {type(wired).__name__}, which is not a Hugging Face model")
    plain = _rebuild(wired)
    _check_agreement(source, plain)
    return plain, source.tokenizer


def _rebuild(wired: Any) -> Any:
    """A fresh module of the same class and config that holds the wired module's parameters and buffers."""
    with torch.device("meta"):
        plain = type(wired)(copying.deepcopy(wired.config))
    for path, module in plain.named_modules():
        for table in (module._parameters, module._buffers):
            for name, mine in table.items():
                if mine is not None:
                    full = f"{path}.{name}" if path else name
                    table[name] = _tensor_at(wired, full, mine.shape)
    if getattr(wired, "generation_config", None) is not None:
        plain.generation_config = copying.deepcopy(wired.generation_config)
    return plain.train(wired.training)


def _tensor_at(wired: nn.Module, path: str, shape: torch.Size) -> Any:
    module: Any = wired
    *parents, name = path.split(".")
    for parent in [*parents, None]:
        while isinstance(module, nn.Module) and "_original_component" in module._modules:
            module = module._modules["_original_component"]
        if parent is not None:
            module = module._modules.get(parent) if isinstance(module, nn.Module) else None
    found = None
    if isinstance(module, nn.Module):
        found = module._parameters.get(name, module._buffers.get(name))
    if found is None or found.shape != shape:
        state = "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(shape)}"
        raise ModelError(f"cannot rebuild the bridge's {type(wired).__name__}: {path} {state}; give the module itself")
    return found


@torch.no_grad()
def _check_agreement(bridge: Any, plain: Any) -> None:
    weight = plain.get_input_embeddings().weight
    if weight.is_meta:
        return
    ids = torch.arange(1, 7, device=weight.device).remainder(weight.shape[0])[None]
    bridge_training, plain_training = bridge.training, plain.training
    bridge.eval(), plain.eval()
    try:
        theirs, ours = bridge(ids, return_type="logits"), plain(input_ids=ids)[0]
    finally:
        bridge.train(bridge_training), plain.train(plain_training)
    tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
    difference, scale = (theirs - ours).abs().max().item(), ours.abs().max().item()
    if not difference <= tolerance * max(scale, 1.0):
        raise ModelError(
            f"the bridge and the plain module that it wraps disagree by {difference:.3g} in logits of up to {scale:.3g}: "
            f"weights were edited through the bridge, or hooks on it change the result; call bridge.reset_hooks(), or "
            f"give the module itself"
        )
