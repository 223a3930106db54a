"""A judge behind any OpenAI-compatible server.

1. The key is read from an environment variable before any request, and goes into the request's header alone: not into
   the cache, an error, a log, a repr or a provenance.
2. Requests are repeated, and the form of the reply negotiated, by `interp.conflict.api_requests`.
3. A reply that is no JSON, lacks a score or has one outside 1 … 5 is asked for again: with what was wrong, after a
   worked example, in a simpler form. What is still wrong after `asks` times is kept as it was answered and marked; no
   average takes it in (`interp.conflict.cras_summaries`).
4. Usable replies are kept in `cache` under the hash of server, model, messages and schema: nothing is paid for twice,
   and a run that lost its server goes on where it was.

The answers to be graded are sent to that server. What they hold cannot leave its frame, but may sway the judge
(`interp.conflict.judge_prompts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from interp.atomic import write_atomically
from interp.conflict.api_requests import Messages, Reply, Server, Stopped
from interp.conflict.judge_prompts import rubric_messages, schema, scoring_messages
from interp.conflict.judge_replies import read_rubric, read_scores
from interp.conflict.judges import RoleQuery, Scores
from interp.conflict.rubrics import TEMPLATE, Rubric
from interp.errors import InputError, ModelError

T = TypeVar("T")
RUBRICS = ("written", "template")
_LEAST = {"timeout": 1e-3, "max_retries": 0, "asks": 1, "workers": 1, "max_tokens": 1, "backoff": 0}


@dataclass(eq=False, repr=False)
class ApiJudge:
    """A judge behind an OpenAI-compatible server; see the module. It needs `openai`: `pip install 'interp[judge]'`.

    Attributes:
        base_url: of the server, with its version, such as "http://127.0.0.1:8000/v1".
        model: the model's name on the server.
        key_env: environment variable with the key; `None` for a server that wants none.
        rubric: "written" by the model for each role prompt and task, or "template" (the fixed text).
        timeout: seconds for one request.
        max_retries: tries after the first, of a request that failed.
        asks: how often one reply is asked for until it can be used.
        workers: requests at the same time; also the answers per unit of work.
        cache: a folder for usable replies.
        max_tokens: longest reply.
        temperature: of the server's sampling; `None` leaves it to the server.
        backoff: seconds before the second try.
        label: name of the judge; by default the model's.

    Raises:
        InputError: `openai` is not installed, the key is missing, an address that is none or holds a password, a
            setting out of range.

    Example:
        >>> judge = ApiJudge("https://api.openai.com/v1", "gpt-4.1-mini", cache="judged")   # doctest: +SKIP
        >>> cras(judge, queries, out="scores")                                             # doctest: +SKIP
    """

    base_url: str
    model: str
    key_env: str | None = "OPENAI_API_KEY"
    rubric: str = "written"
    timeout: float = 60.0
    max_retries: int = 4
    asks: int = 3
    workers: int = 4
    cache: str | Path | None = None
    max_tokens: int = 1500
    temperature: float | None = 0.0
    backoff: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        _check_address(self.base_url)
        if not isinstance(self.model, str) or not self.model.strip():
            raise InputError(f"model={self.model!r}; expected the model's name on the server")
        if self.rubric not in RUBRICS:
            raise InputError(f"rubric={self.rubric!r}; expected one of {', '.join(RUBRICS)}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name}={getattr(self, name)!r}; expected at least {least}")
        self._server = Server(
            self.base_url,
            self.model,
            _read_key(self.key_env),
            key_env=self.key_env,
            timeout=self.timeout,
            max_retries=self.max_retries,
            backoff=self.backoff,
            temperature=self.temperature,
        )

    @property
    def name(self) -> str:
        """The label, else "api:" and the model's name."""
        return self.label or f"api:{self.model}"

    @property
    def chunk(self) -> int:
        """As many answers as requests at the same time."""
        return self.workers

    @property
    def writes_rubrics(self) -> bool:
        """Whether the model writes them."""
        return self.rubric == "written"

    @property
    def n_requests(self) -> int:
        """Requests made so far, repeated ones included."""
        return self._server.n_requests

    def about(self) -> dict[str, Any]:
        """Server, model and settings that matter for the scores; no key."""
        names = ("base_url", "model", "rubric", "temperature", "asks")
        return {"kind": "api", **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        return f"ApiJudge({self.base_url!r}, {self.model!r}, key_env={self.key_env!r}, rubric={self.rubric!r})"

    def rubrics(self, asked: Sequence[tuple[str, str]]) -> list[Rubric]:
        """Rubrics that the model writes, or the fixed text.

        Raises:
            ModelError: a rubric that could not be read after all asks.
            ResourceError: see `scores`.
        """
        return self._each(self._rubric, asked) if self.writes_rubrics else [TEMPLATE] * len(asked)

    def scores(self, graded: Sequence[tuple[RoleQuery, Rubric]]) -> list[Scores]:
        """Scores of answers, several requests at a time.

        Raises:
            ResourceError: the server cannot be reached, refuses the key or the request, or keeps failing.
        """
        return self._each(self._grade, graded)

    def _each(self, work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """`work` on every item. The first error stops those that wait; it is raised when those that run have ended."""
        self._server.stop.clear()
        with ThreadPoolExecutor(self.workers) as pool:
            tasks = [pool.submit(work, item) for item in items]
            try:
                for task in tasks:
                    task.exception()  # waits; what went well is in the cache by then
                    if task.exception() is not None:
                        break
            finally:
                self._server.stop.set()
                for task in tasks:
                    task.cancel()
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        if errors:
            # A request that was stopped says less than the one that stopped it.
            raise next((error for error in errors if not isinstance(error, Stopped)), errors[0]) from None
        return [task.result() for task in tasks]

    def _rubric(self, asked: tuple[str, str]) -> Rubric:
        role, task = asked
        forms = [(rubric_messages(role, task, example=shown), "rubric") for shown in (False, True)]
        rubric, problem = self._ask(forms, lambda reply: read_rubric(reply, self.name))
        if rubric is None:
            raise ModelError(
                f"judge {self.name!r} wrote no rubric in {self.asks} replies ({problem}); give rubric='template' for "
                f"the fixed one, or another model"
            )
        return rubric

    def _grade(self, item: tuple[RoleQuery, Rubric]) -> Scores:
        query, rubric = item
        forms = [
            (scoring_messages(query.role, query.task, query.answer, rubric, example=shown), kind)
            for shown, kind in ((False, "scores"), (True, "flat"))
        ]
        return self._ask(forms, read_scores)[0]

    def _ask(self, forms: Sequence[tuple[Messages, str]], read: Callable[[str], tuple[T, str]]) -> tuple[T, str]:
        """What the first usable reply holds, else the last one, and what is wrong with it ("" if nothing is).

        Args:
            forms: (messages, kind of reply) of the first ask, and of all further ones.
            read: gives what a reply holds, and what is wrong with it.
        """
        (messages, kind), again = forms
        limit = self.max_tokens
        for number in range(2, self.asks + 2):
            path = self._path(messages, kind)
            kept = _kept(path)
            reply = self._server.ask(messages, schema(kind), kind, limit) if kept is None else Reply(kept, False)
            found, problem = read(reply.text)
            if not problem:
                if kept is None and path is not None:
                    _keep(path, reply.text, self.model)
                break
            limit = limit * 2 if reply.cut else limit
            note = f"\n\nThis is ask {number}: the last reply could not be used, because {problem}."
            messages, kind = again
            messages = [*messages[:-1], {"role": "user", "content": messages[-1]["content"] + note}]
        return found, problem

    def _path(self, messages: Messages, kind: str) -> Path | None:
        """The file of a reply; its name does not depend on how the server enforces the schema, unknown before a request."""
        if self.cache is None:
            return None
        asked = json.dumps([self.base_url, self.model, messages, schema(kind), self.temperature], sort_keys=True)
        return Path(self.cache, f"{hashlib.sha256(asked.encode()).hexdigest()[:40]}.json")


def _kept(path: Path | None) -> str | None:
    """A kept reply; none where it is missing or damaged."""
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            reply = json.loads(path.read_text(encoding="utf-8"))["reply"]
            return reply if isinstance(reply, str) else None
    return None


def _keep(path: Path, reply: str, model: str) -> None:
    packed = json.dumps({"reply": reply, "model": model, "asked": int(time.time())}).encode()
    write_atomically(path, lambda file: file.write(packed))


def _check_address(base_url: str) -> None:
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise InputError(f"base_url={base_url!r:.80}; expected an address such as 'http://127.0.0.1:8000/v1'")
    if address.username or address.password or address.query or address.fragment:
        raise InputError(
            "base_url holds a name, a password or a query, which results would show; put the key into an environment "
            "variable and name that as key_env"
        )


def _read_key(key_env: str | None) -> str:
    if key_env is None:
        return ""
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {key_env} is not set; put the key of the judge's server there, or give "
            f"key_env=None for a server that wants none"
        )
    return key
