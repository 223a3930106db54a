"""The same model in nnsight, and back: `TransformersModel` (nnsight 0.8), here and on NDIF's servers.

    nn_model = to_nnsight(model)                                    # the same module and weights, nothing is copied
    tensors = capture(nn_model, "The water", [("hidden", 3), ("logits", -1)])
    ids = generate_clamped(nn_model, "My favourite animal", Clamp(27, 1510, -10))
    model = interp.load_model(nn_model)                             # the engine on the same module

A model that does not fit here (`remote=True` runs on NDIF and needs a network, NDIF_API_KEY and a deployed model):

    nn_model = remote_model("owner/name")                           # config and tokenizer alone, weights on "meta"
    tensors = capture(nn_model, "The water", [("hidden", 60)], remote=True)

1. nnsight does not rewire: modules, `state_dict` and hooks stay as they are. It puts a function in front of each module's
   `forward` that passes through outside a trace, and interp's captures and clamps give the same numbers as before.
2. Where interp's sites live comes from `interp.architectures`; `locate` gives the module's path, its input or output, and
   the part of it. In a trace: `nn_model.get(place.path).output`, or `.input`.
3. The body of a trace runs inside the forward pass and must read in the order in which the model computes; `capture`
   sorts. Bodies need a source file and their own lines: they do not work in `python -c`.
4. In `generate`, an edit acts on the prompt alone unless it stands in `for step in tracer.iter[…]`; what stands after an
   open-ended loop does not run, so the result is read in an invoke of its own (`_generate` is the recipe).
5. Remotely the body travels as source text with the values that it names. The bodies here name tensors, numbers and
   envoys, nothing of interp, which the server lacks. `remote="local"` runs a trace here through the same serialisation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from interp.architectures import NEURON_SITES, Architecture
from interp.errors import InputError, ModelError

if TYPE_CHECKING:
    from interp.intervene import Clamp
    from interp.model import Model

# The order in which a layer computes its sites. A decoder's attention module holds its output projection, BERT's does not.
_DECODER = ("resid_pre", "z", "attn_out", "pattern", "gate", "up", "hidden", "mlp_out", "resid_post")
_ENCODER = ("resid_pre", "pattern", "z", "attn_out", "up", "hidden", "mlp_out", "resid_post")
# Greedy decoding with a generation config that asks for sampling would warn about each of these.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Place:
    """Where a site lives in an nnsight model.

    Attributes:
        path: the module's dotted path, for `nn_model.get(path)`; empty for the model itself, whose output has `.logits`.
        side: "input" or "output" of that module.
        index: which element of a tuple output (0 where the output is no tuple).
        columns: the part of the last dimension, where a family fuses several projections in one; else `None`.
    """

    path: str
    side: str
    index: int = 0
    columns: slice | None = None


def to_nnsight(model: Model) -> Any:
    """A `TransformersModel` around `model.hf`: the same module and weights; `model` keeps working, with equal results.

    Args:
        model: what `load_model` gave. Its tokenizer is copied, because nnsight pads on the left and sets a pad token.

    Raises:
        ModelError: the model has no tokenizer, which nnsight's pipelines need.

    Example:
        >>> nn_model = to_nnsight(model)                               # doctest: +SKIP
        >>> with nn_model.trace("The water"):                          # doctest: +SKIP
        ...     hidden = nn_model.model.layers[3].mlp.down_proj.input.save()
    """
    from nnsight import TransformersModel

    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer, which nnsight needs; give one to load_model")
    options: dict[str, Any] = {"tokenizer": copy.deepcopy(model.tokenizer)}
    if model.arch.family.decoder:
        options["task"] = "text-generation"
    else:
        masked = type(model.hf).__name__.endswith("ForMaskedLM")
        options["task"] = "fill-mask" if masked else "feature-extraction"
    if not getattr(model.hf, "hf_device_map", None):
        options["device"] = model.device  # or the pipeline would move the module to the first GPU
    return TransformersModel(model.hf, **options)


def unwrap(source: Any) -> tuple[nn.Module, Any]:
    """The module inside an nnsight model, itself and not a copy, and its tokenizer (or `None`).

    A model without weights (on the meta device, as `TransformersModel("owner/name")` is at first) loads them now.

    Raises:
        ModelError: the model carries edits (`model.edit(inplace=True)`), which the engine would leave out.
    """
    if getattr(source, "_edits", None):
        raise ModelError(
            "the nnsight model carries edits, which act in traces alone; call model.clear_edits() and use interp.intervene"
        )
    if getattr(source, "dispatched", True) is False:
        source.dispatch()
    return source._module, getattr(source, "tokenizer", None)


def remote_model(hub_id: str, *, revision: str | None = None, **options: Any) -> Any:
    """A `TransformersModel` without weights (meta device), for traces with `remote=True`: any size fits.

    Args:
        hub_id: owner/name on the hub, or a folder with config and tokenizer.
        revision: branch, tag or commit.
        options: for nnsight, e.g. `config=…`, `tokenizer=…`, `attn_implementation="eager"`.

    Raises:
        ModelError: config or tokenizer cannot be read, for example without a network.
    """
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    try:
        # nnsight 0.8 does not load it for a model without weights.
        tokenizer = options.pop("tokenizer", None) or AutoTokenizer.from_pretrained(hub_id, revision=revision)
        return TransformersModel(hub_id, task="text-generation", revision=revision, tokenizer=tokenizer, **options)
    except Exception as error:
        raise ModelError(
            f"cannot read config and tokenizer of {hub_id!r} ({type(error).__name__}: {str(error)[:200]}); expected a hub "
            f"id (needs a network or a filled cache) or a local folder"
        ) from error


def locate(source: Any, site: str, layer: int = -1) -> Place:
    """Where one of interp's sites lives in an nnsight model.

    Args:
        source: a `TransformersModel`, with or without weights.
        site: one of `interp.architectures.SITES`.
        layer: 0-based, negative counts from the end; ignored for "logits".

    Raises:
        InputError: an unknown site, a layer out of range, or a site that the family has not.
    """
    found = Architecture(source._module).site(site, layer)
    paths = {id(module): path for path, module in source._module.named_modules()}
    return Place(paths[id(found.module)], found.side, found.index or 0, found.columns)


@torch.no_grad()
def capture(
    source: Any, prompt: str | Sequence[int], sites: Sequence[tuple[str, int]], *, remote: bool | str = False
) -> dict[tuple[str, int], Tensor]:
    """Run a prompt once through an nnsight model and keep whole tensors, as `interp.capture.Keep` does.

    Args:
        source: a `TransformersModel`. For a pattern it runs with eager attention.
        prompt: text, or token ids.
        sites: (site, layer) pairs; layer -1 for "logits".
        remote: `True` for NDIF, "local" to run the same serialised request here, a URL for another server. Every tensor
            is downloaded whole: ask for few.

    Returns:
        {(site, layer): tensor} on the CPU, positions along the first dimension; a pattern is (head, query, key).

    Raises:
        InputError: an empty prompt, no site, or one that `locate` refuses.
        ModelError: the remote run failed.
    """
    ids, points = _inputs(source, prompt), _points(source, sites)
    with _eager(source, sites), _explained(remote):
        found = _trace(source, list(points.values()), ids, {"remote": remote})
    return {site: tensor[0].detach().cpu() for site, tensor in zip(points, found, strict=True)}


def remote_request(
    source: Any, prompt: str | Sequence[int], sites: Sequence[tuple[str, int]], *, model_key: str | None = None
) -> tuple[Any, bytes]:
    """What `capture(…, remote=True)` would send, built without sending it: to see that it can be, and how large it is.

    Args:
        source, prompt, sites: as in `capture`; the model is usually one from `remote_model`.
        model_key: the model's name on the server. By default nnsight makes it, and asks the hub for the id's spelling.

    Returns:
        nnsight's `RequestModel` and the payload: the trace body's source, the prompt's ids, modules by name; no weights.
    """
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.schema.request import RequestModel

    built: list[tuple[Any, bytes]] = []

    class Recorder(RemoteBackend):
        def __call__(self, tracer: Any = None) -> None:
            request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
            built.append((request, self._serialize(tracer)))

    ids, points = _inputs(source, prompt), _points(source, sites)
    with _eager(source, sites):
        backend = Recorder(model_key or source.to_model_key(), env=source._remoteable_get_env())
        _trace(source, list(points.values()), ids, {"backend": backend})
    return built[0]


@torch.no_grad()
def generate_clamped(
    source: Any, prompt: str | Sequence[int], clamp: Clamp, *, max_new_tokens: int = 40, remote: bool | str = False
) -> list[int]:
    """Continue a prompt greedily with neurons clamped; `_generate` below is the recipe for your own interventions.

    Args:
        source: a `TransformersModel`.
        prompt: text, or token ids.
        clamp: as in `interp.clamp`, with one number as value and no `rows`; all sites, modes and positions.
        max_new_tokens: longest continuation in tokens.
        remote: as in `capture`.

    Returns:
        The continuation's token ids, end token included.

    Raises:
        InputError: a clamp that cannot be applied, an empty prompt.
        ModelError: the remote run failed.
    """
    if clamp.site not in NEURON_SITES:
        raise InputError(f"site {clamp.site!r} cannot be clamped; expected one of {', '.join(NEURON_SITES)}")
    if clamp.mode not in ("set", "add", "scale", "zero") or clamp.positions not in _STEPS:
        raise InputError(f"mode={clamp.mode!r}, positions={clamp.positions!r}; expected those of interp.clamp")
    value = torch.as_tensor(0.0 if clamp.mode == "zero" else clamp.value)
    if clamp.rows is not None or value.dim() or not value.isfinite() or torch.as_tensor(clamp.neuron).numel() == 0:
        raise InputError("one prompt, one finite value and at least one neuron are expected; else use interp.intervene")
    place, arch = locate(source, clamp.site, clamp.layer), Architecture(source._module)
    start = 0 if place.columns is None else place.columns.start or 0
    columns = [start + arch.check_neuron(neuron) for neuron in torch.as_tensor(clamp.neuron).reshape(-1).tolist()]
    edit = (clamp.mode, columns, value.item(), clamp.positions == "last")
    ids, envoy = _inputs(source, prompt), _envoys(source)[place.path]
    with _explained(remote), warnings.catch_warnings():
        # An open-ended loop always asks for one step more than there is, which nnsight reports.
        warnings.filterwarnings("ignore", message=".* was never reached")
        result = _generate(source, envoy, place.side, edit, _STEPS[clamp.positions], ids, max_new_tokens, remote)
    return result[0, ids.shape[1] :].tolist()


# Steps of a generation with a KV cache: the first forward pass reads the prompt, each later one a generated token.
_STEPS = {"all": slice(None), "prompt": slice(1), "generated": slice(1, None), "last": slice(1)}


def _generate(
    model: Any,
    envoy: Any,
    side: str,
    edit: tuple[str, list[int], float, bool],
    steps: slice,
    ids: Tensor,
    new: int,
    remote: Any,
) -> Tensor:
    mode, columns, value, last = edit
    at = slice(-1, None) if last else slice(None)
    with model.generate(max_new_tokens=new, remote=remote, **_GREEDY) as tracer:
        with tracer.invoke(ids):
            for _step in tracer.iter[steps]:
                tensor = envoy.input if side == "input" else envoy.output
                if mode == "add":
                    tensor[:, at, columns] += value
                elif mode == "scale":
                    tensor[:, at, columns] *= value
                else:
                    tensor[:, at, columns] = value
        with tracer.invoke():
            result = tracer.result.save()
    return result


def _trace(
    model: Any, points: list[tuple[Any, str, int, slice | None]], ids: Tensor, how: dict[str, Any]
) -> list[Tensor]:
    from nnsight import save

    found: list[Tensor] = []
    with model.trace(ids, **how):
        found = save([])
        for envoy, side, index, columns in points:
            value = envoy.input if side == "input" else envoy.output
            if hasattr(value, "logits"):
                value = value.logits
            if isinstance(value, tuple):
                value = value[index]
            found.append((value if columns is None else value[..., columns]).clone())  # it may yet be changed in place
    return found


def _points(source: Any, sites: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[Any, str, int, slice | None]]:
    """Where to read each site, in the order in which the model computes them."""
    if not sites:
        raise InputError("no site was given; expected at least one (site, layer)")
    arch, envoys = Architecture(source._module), _envoys(source)
    order = _DECODER if arch.family.decoder else _ENCODER
    places = {site: locate(source, *site) for site in sites}

    def when(site: tuple[str, int]) -> tuple[int, int]:
        name, layer = site
        return (arch.n_layers, 0) if name == "logits" else (arch.check_layer(layer), order.index(name))

    return {s: (envoys[p.path], p.side, p.index, p.columns) for s in sorted(places, key=when) for p in (places[s],)}


def _envoys(source: Any) -> dict[str, Any]:
    """nnsight's envoy of each module, by the module's path; attribute access would miss modules named `output`."""
    paths = {id(module): path for path, module in source._module.named_modules()}
    return {paths[id(envoy._module)]: envoy for envoy in source.modules() if id(envoy._module) in paths}


def _inputs(source: Any, prompt: str | Sequence[int]) -> Tensor:
    ids = source.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise InputError("the prompt is empty; expected at least one token")
    return torch.tensor([ids])


@contextmanager
def _eager(source: Any, sites: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Eager attention where a pattern is wanted; a remote request carries the choice along."""
    before = source.attn_implementation
    switch = before != "eager" and any(name == "pattern" for name, _ in sites)
    if switch:
        source._module.set_attn_implementation("eager")
    try:
        yield
    finally:
        if switch:
            source._module.set_attn_implementation(before)


@contextmanager
def _explained(remote: bool | str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if remote is False or remote == "local":
            raise
        raise ModelError(
            f"the remote run failed ({type(error).__name__}: {str(error)[:300]}); it needs a network, an API key in "
            f"NDIF_API_KEY, and a model that is deployed there (nnsight.status() lists them)"
        ) from error
