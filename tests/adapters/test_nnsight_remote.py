"""nnsight's remote path without a network: models without weights, requests built, and run through the serialisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_encoder, tiny_hf, tiny_tokenizer

from interp.adapters import nnsight as nnsight_adapter
from interp.errors import ModelError
from interp.intervene import Clamp
from interp.model import Model, load_model

PROMPT = [5, 9, 14, 22, 31, 40]
SITES = [("up", 2), ("pattern", 1), ("hidden", 0), ("gate", 2), ("logits", -1)]  # in no order on purpose


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_hf("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def key_of(name: str) -> str:
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps({'repo_id': name, 'revision': None})}"


def test_a_request_is_built_without_weights(folder: Path) -> None:
    nn_model = nnsight_adapter.remote_model(str(folder))
    assert all(weight.is_meta for weight in nn_model._module.parameters())
    request, payload = nnsight_adapter.remote_request(nn_model, PROMPT, SITES, model_key=key_of("owner/name"))
    assert not nn_model.dispatched
    assert json.loads(request.model_key.split(":", 1)[1])["repo_id"] == "owner/name"
    assert request.env == {"attn_implementation": "eager"}  # a pattern is wanted
    weights = sum(weight.nelement() * 4 for weight in nn_model._module.parameters())
    assert 100 < len(payload) < 10_000 < weights
    request, _ = nnsight_adapter.remote_request(nn_model, PROMPT, [("up", 0)], model_key=key_of("owner/name"))
    assert request.env == {"attn_implementation": nn_model.attn_implementation}


def test_a_server_can_run_the_request(folder: Path) -> None:
    """What NDIF does with it: rebuild the tracer against its own live model, run it, and return what was saved."""
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.tracer import dec, inc

    client = nnsight_adapter.remote_model(str(folder))
    request, payload = nnsight_adapter.remote_request(client, PROMPT, [("hidden", 1)], model_key=key_of("owner/name"))
    engine = load_model(folder, device="cpu")
    server = nnsight_adapter.to_nnsight(engine)
    tracer = RequestModel.deserialize(payload, server._remoteable_persistent_objects(), compress=request.compress)
    inc()  # as on entering a trace
    try:
        with torch.no_grad():
            tracer.execute(tracer.info.code)
    finally:
        dec()
    [hidden] = tracer.info.frame.f_locals["found"]
    expected = nnsight_adapter.capture(server, PROMPT, [("hidden", 1)])["hidden", 1]
    torch.testing.assert_close(hidden[0], expected)


def test_local_simulation_gives_the_same(tiny: Any) -> None:
    nn_model = nnsight_adapter.to_nnsight(tiny("llama"))
    here = nnsight_adapter.capture(nn_model, PROMPT, SITES)
    there = nnsight_adapter.capture(nn_model, PROMPT, SITES, remote="local")
    assert here.keys() == there.keys() == set(SITES)
    assert all(torch.equal(here[site], there[site]) for site in SITES)
    clamp = Clamp(layer=1, neuron=3, value=30.0)
    text = nnsight_adapter.generate_clamped(nn_model, PROMPT, clamp, max_new_tokens=6)
    assert nnsight_adapter.generate_clamped(nn_model, PROMPT, clamp, max_new_tokens=6, remote="local") == text


def test_unwrap_loads_the_weights_that_are_missing(folder: Path) -> None:
    model = load_model(nnsight_adapter.remote_model(str(folder)))
    assert isinstance(model, Model)
    assert model.fingerprint == load_model(folder, device="cpu").fingerprint
    assert model.encode("dog water") == [tiny_tokenizer()("dog water")["input_ids"]]


def test_an_unreachable_server_is_explained(folder: Path) -> None:
    nn_model = nnsight_adapter.remote_model(str(folder))
    nn_model.to_model_key = lambda: key_of("owner/name")  # which would ask the hub
    with pytest.raises(ModelError, match="NDIF_API_KEY"):
        nnsight_adapter.capture(nn_model, PROMPT, [("hidden", 1)], remote="http://127.0.0.1:9")


def test_an_unreadable_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read config and tokenizer"):
        nnsight_adapter.remote_model(str(tmp_path / "nothing" / "here"))


def test_an_encoder(tiny: Any) -> None:
    model = load_model(tiny_encoder(), tiny_tokenizer())
    nn_model = nnsight_adapter.to_nnsight(model)
    sites = [("attn_out", 1), ("up", 1), ("pattern", 1), ("mlp_out", 1), ("z", 1), ("hidden", 1)]
    found = nnsight_adapter.capture(nn_model, PROMPT, sites)
    from interp.capture import Keep, run_probes

    probe = Keep(sites)
    run_probes(model, [PROMPT], [probe])
    for site in sites:
        torch.testing.assert_close(found[site], probe.tensors[site][0], atol=1e-5, rtol=1e-4)
