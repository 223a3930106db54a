"""What a model is asked.

| task | the model reads | classes |
|---|---|---|
| `Verbalizer` | few-shot prompt, text in a template | label words, one token each, at the last position |
| `NextToken` | the text | the vocabulary at the last position |
| `Continuation` | the text | the vocabulary, at each token of a given continuation |
| `Classifier` | the text | the classes of a model with a classification head, such as an encoder |

What is explained is the text, token by token or word by word: `interp.agreement.encoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InputError
from interp.model import Model


@dataclass(frozen=True)
class Example:
    """A text to explain.

    Attributes:
        text: a string, or token ids.
        label: the gold class, by name or index; the continuation's text for `Continuation` and `NextToken`; or `None`.
    """

    text: str | Sequence[int]
    label: str | int | None = None


@dataclass(frozen=True)
class Verbalizer:
    """Classification by a label word after the text.

    Attributes:
        labels: {class: label word}; a word is one token of the model, mostly with its leading space.
        template: how a text is written, with {text} once; the label word follows.
        shots: (text, class) examples that go before.
        instruction: goes before all.
        separator: between shots.

    Example:
        >>> Verbalizer({"no": " no", "yes": " yes"}, shots=[("A gem.", "yes")]).prompt()
        ('A gem. => yes\\n', ' =>')
    """

    labels: dict[str, str]
    template: str = "{text} =>"
    shots: Sequence[tuple[str, str]] = ()
    instruction: str = ""
    separator: str = "\n"
    name: str = field(default="verbalizer", init=False)

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise InputError(f"labels={self.labels!r}; expected at least two classes")
        if self.template.count("{text}") != 1:
            raise InputError(f"template={self.template!r}; expected {{text}} in it once")
        unknown = [label for _, label in self.shots if label not in self.labels]
        if unknown:
            raise InputError(f"a shot has the class {unknown[0]!r}; expected one of {', '.join(self.labels)}")

    def prompt(self) -> tuple[str, str]:
        """What stands before and after the text."""
        before, after = self.template.split("{text}")
        shots = "".join(f"{before}{text}{after}{self.labels[label]}{self.separator}" for text, label in self.shots)
        return self.instruction + shots + before, after

    def choices(self, model: Model) -> tuple[int, ...]:
        """The label words' token ids.

        Raises:
            InputError: a word is not one token, or two classes have the same word.
        """
        found = []
        for label, word in self.labels.items():
            ids = tokenizer_of(model)(word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                pieces = [model.decode([token], skip_special_tokens=False) for token in ids]
                raise InputError(
                    f"the label word {word!r} of class {label!r} is {len(ids)} tokens ({pieces}); expected one: choose another "
                    f"word, mostly one with a leading space, or explain a given continuation with Continuation()"
                )
            found.append(int(ids[0]))
        if len(set(found)) < len(found):
            raise InputError(f"labels={self.labels!r}; two classes have the same label word")
        return tuple(found)


@dataclass(frozen=True)
class NextToken:
    """The next token: the predicted one, or with of="gold" an example's label, which is one token."""

    name: str = field(default="next_token", init=False)


@dataclass(frozen=True)
class Continuation:
    """A given continuation of one or more tokens: every example's label."""

    name: str = field(default="continuation", init=False)


@dataclass(frozen=True)
class Classifier:
    """A model with a classification head.

    Attributes:
        labels: names of the classes; by default the config's.
        reads: whose row of attention the head reads: "first" ([CLS]), "last" or "mean" of all; by default "first"
            for encoders and "last" for decoders.
    """

    labels: tuple[str, ...] | None = None
    reads: str | None = None
    name: str = field(default="classifier", init=False)

    def __post_init__(self) -> None:
        if self.reads not in (None, "first", "last", "mean"):
            raise InputError(f"reads={self.reads!r}; expected 'first', 'last' or 'mean'")


Task = Verbalizer | NextToken | Continuation | Classifier


def default_task(model: Model) -> Task:
    """`NextToken` for causal language models, `Classifier` for models with a classification head.

    Raises:
        InputError: the model has neither.
    """
    if has_classes(model):
        return Classifier()
    if model.arch.family.decoder:
        return NextToken()
    raise InputError(
        f"{model.name} ({type(model.hf).__name__}) has no classification head; load a class such as "
        f"AutoModelForSequenceClassification and give it to load_model with its tokenizer"
    )


def class_names(model: Model, task: Task) -> tuple[str, ...]:
    """Names of the classes; none where the classes are the vocabulary.

    Raises:
        InputError: a classifier's names are not as many as its classes.
    """
    if isinstance(task, Verbalizer):
        return tuple(task.labels)
    if not isinstance(task, Classifier):
        return ()
    config = model.hf.config
    n_classes = int(config.num_labels)
    named = task.labels or tuple(str(config.id2label[at]) for at in range(n_classes))
    if len(named) != n_classes:
        raise InputError(f"labels={named!r}; the model has {n_classes} classes")
    return named


def has_classes(model: Model) -> bool:
    """Whether the model was loaded with a classification head."""
    architecture = type(model.hf).__name__
    return architecture.endswith("ForSequenceClassification") or bool(getattr(model.hf, "is_classifier", False))


def tokenizer_of(model: Model) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: it has none.
    """
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer; give one to load_model, or token ids")
    return model.tokenizer
