"""Oracles for explanations: targets computed plainly, one whole input at a time, and games whose values are a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tiny_models import WORDS

from interp.agreement.coalitions import Coalitions
from interp.agreement.ground_truth import linear_classifier
from interp.agreement.tasks import Continuation, Verbalizer
from interp.model import Model, load_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class PlainGame:
    """One example's target from a single forward pass of the whole input: no cache, no packing, no padding.

    Args:
        coalitions: gives the example's ids and explained positions, nothing else.
        example: which.
    """

    def __init__(self, coalitions: Coalitions, example: int) -> None:
        one, model = coalitions.encoded[example], coalitions.model
        self.hf, self.target, self.n_reads = model.hf, coalitions.target, one.n_reads
        self.positions = list(one.positions)
        self.choices: Any = slice(None)
        if isinstance(coalitions.task, Verbalizer):
            words = coalitions.task.labels.values()
            self.choices = [model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        table = model.hf.get_input_embeddings()
        with torch.no_grad():
            self.embeds = table(torch.tensor([one.ids]))
            absent = {
                "zero": lambda: torch.zeros_like(self.embeds[0, 0]),
                "mean": lambda: table(torch.arange(model.arch.vocab_size)).mean(0),
                "pad": lambda: table(torch.tensor(model.tokenizer.pad_token_id)),
                "mask": lambda: table(torch.tensor(model.tokenizer.mask_token_id)),
            }
            vector = absent[coalitions.baseline]()
            self.baseline = self.embeds.clone()
            self.baseline[0, self.positions] = vector
            logits = self.logits(self.embeds)[0]
        given = one.gold if isinstance(coalitions.task, Continuation) or coalitions.of == "gold" else None
        self.wanted = logits.argmax(-1) if given is None else torch.tensor(given)
        others = logits.clone()
        others[torch.arange(len(others)), self.wanted] = -torch.inf
        self.contrast = others.argmax(-1)

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        """(batch, read, class)."""
        logits = self.hf(inputs_embeds=embeds).logits.float()
        return logits[:, -self.n_reads :, self.choices] if self.n_reads else logits[:, None]

    def __call__(self, embeds: torch.Tensor) -> torch.Tensor:
        """(batch) targets of embeddings; differentiable."""
        found = []
        for read in self.logits(embeds):  # (read, class)
            rows = torch.arange(len(read))
            if self.target == "logit_difference":
                found.append((read[rows, self.wanted] - read[rows, self.contrast]).sum())
            else:
                total = torch.log_softmax(read, -1)[rows, self.wanted].sum()
                found.append(total if self.target == "log_prob" else total.exp())
        return torch.stack(found)

    @torch.no_grad()
    def value(self, kept: Any) -> float:
        """The target with some of the explained tokens replaced."""
        embeds = self.embeds.clone()
        gone = [at for at, stays in zip(self.positions, kept, strict=True) if not stays]
        embeds[0, gone] = self.baseline[0, gone]
        return float(self(embeds)[0])

    def of_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """The target of rows of zeros and ones, as captum asks for it."""
        return torch.tensor([self.value(mask > 0.5) for mask in masks], dtype=torch.float64)


class TableGame:
    """As much of `Coalitions` as perturbations use, with values from tables (2ⁿ), row r keeping token i where bit i is set."""

    def __init__(self, *tables: Sequence[float]) -> None:
        self.tables = [np.asarray(table, dtype=float) for table in tables]
        self.computed: list[set[int]] = [set() for _ in tables]

    def size(self, example: int) -> int:
        return int(np.log2(len(self.tables[example])))

    def full(self, example: int) -> float:
        return float(self.tables[example][-1])

    def empty(self, example: int) -> float:
        return float(self.tables[example][0])

    def compute(self, wanted: Mapping[int, np.ndarray], progress: Any = False) -> None:
        for example, kept in wanted.items():
            self.computed[example] |= set(_rows(kept).tolist())

    def known(self, example: int, kept: np.ndarray) -> np.ndarray:
        rows = _rows(kept)
        assert set(rows.tolist()) <= self.computed[example]
        return self.tables[example][rows]

    def values(self, wanted: Mapping[int, np.ndarray], progress: Any = False) -> dict[int, np.ndarray]:
        self.compute(wanted)
        return {example: self.known(example, kept) for example, kept in wanted.items()}


def _rows(kept: np.ndarray) -> np.ndarray:
    kept = np.asarray(kept, dtype=bool)
    return (kept * 2 ** np.arange(kept.shape[1])).sum(1)


def tiny_classifier(seed: int = 0, n_classes: int = 3) -> Model:
    """A random BERT with a classification head, [CLS] and [SEP] around every text, and a mask token."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(words), max_position_embeddings=32, num_labels=n_classes, pad_token_id=0, **sizes
    )
    hf = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "LayerNorm" not in name:  # or attention is uniform and the logits are flat
                parameter.mul_(6)
    return load_model(hf, fast)


def additive_model(contributions: Sequence[float]) -> Model:
    """A classifier whose logit difference is the sum of its tokens' contributions, one token id each."""
    hf = linear_classifier(len(contributions), 1, 2)
    with torch.no_grad():
        hf.embed_tokens.weight.copy_(torch.tensor(contributions)[:, None])
        hf.classifier.weight.copy_(torch.tensor([[0.0], [1.0]]))
        hf.classifier.bias.zero_()
    return load_model(hf, check=False)
