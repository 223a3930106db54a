"""What the engine of agreement is checked against: plain forward passes of one whole sequence at a time, and tokenizers and
classifiers that are small enough to know by heart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import COMMON, GQA, SIZES, tiny_hf, tiny_tokenizer
from torch import Tensor

from interp.model import Model, load_model

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "un",
    "##aff",
    "##able",
    "film",
    "##s",
    "good",
    "bad",
    ",",
    "!",
]


def exact(family: str = "llama", **changes: Any) -> Model:
    """A tiny causal LM in float64."""
    return load_model(tiny_hf(family, **changes).double(), tiny_tokenizer())


@torch.no_grad()
def plain_logits(
    model: Model,
    ids: Sequence[int],
    n_reads: int = 1,
    choices: Sequence[int] | None = None,
    vector: Tensor | None = None,
) -> Tensor:
    """(read, class) logits of one sequence, computed by the model's own forward from the whole of it."""
    table = model.hf.get_input_embeddings()
    size = table.weight.shape[0]
    embedded = table(torch.tensor([[token if token < size else 0 for token in ids]])).clone()
    for position, token in enumerate(ids):
        if token == size:
            assert vector is not None
            embedded[0, position] = vector
    if vector is None and n_reads:
        logits = model.hf(input_ids=torch.tensor([list(ids)])).logits[0]
    else:  # embeddings for decoders with classes too: from ids they take what equals the padding token for padding
        logits = model.hf(inputs_embeds=embedded).logits[0]
    if not n_reads:
        return logits[None].double()
    logits = logits[-n_reads:].double()
    return logits if choices is None else logits[:, list(choices)]


def tiny_classifier(kind: str = "BertForSequenceClassification", n_classes: int = 3, **changes: Any) -> Any:
    """A random classifier with a large head, so that every class wins somewhere."""
    import transformers

    settings = {"bert": SIZES | {"max_position_embeddings": 64}, "llam": GQA, "gpt2": {}, "mist": GQA, "gptn": COMMON}
    config = getattr(transformers, kind.replace("ForSequenceClassification", "Config"))
    torch.manual_seed(0)
    hf = getattr(transformers, kind)(
        config(**{**settings[kind[:4].lower()], "num_labels": n_classes, **changes})
    ).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return hf


def word_pieces() -> Any:
    """A tokenizer as BERT's: lower case, words in pieces, punctuation apart, [CLS] and [SEP] around."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def byte_pairs(bos: bool = False) -> Any:
    """A byte-level BPE as GPT-2's, trained on a few lines; with `bos` it puts <bos> first, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the good film, the bad film => good\n", "unaffable => bad\n"] * 20, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")
