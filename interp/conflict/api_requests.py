"""Requests to an OpenAI-compatible server that fail well.

1. Time-outs, lost connections, 408, 409, 429 and 5xx are tried again after the server's Retry-After, else after 1, 2,
   4 … times `backoff` (and up to a quarter more, so that workers do not all come back at once). Other refusals end the
   run.
2. A reply is asked for by JSON schema; where the server refuses that, as a JSON object, else as plain text. Likewise
   `max_tokens` and `temperature`, which some models refuse. What the server accepts is remembered.
3. The key goes into the request's header and nowhere else. What a server says is searched for the key, which is
   blanked.

All errors are raised without their cause: `openai`'s own hold the request with its headers.
"""

from __future__ import annotations

import email.utils
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from interp.errors import InputError, ResourceError

Messages = list[dict[str, str]]
FORMATS = ("json_schema", "json_object", "text")
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait before we give up


class Stopped(ResourceError):
    """A request that was not made because another one failed."""


@dataclass(frozen=True)
class Reply:
    """What a server said.

    Attributes:
        text: without the key, wherever it stood; "" for a reply that is no chat completion.
        cut: whether it was cut off by its length limit.
    """

    text: str
    cut: bool


class Server:
    """A server, and what is known of it.

    Args:
        base_url: its address with the version.
        model: the model's name there.
        key: the key, or "" for none.
        key_env: whence the key came, for messages.
        timeout: seconds for one request.
        max_retries: tries after the first.
        backoff: seconds before the second try.
        temperature: of the sampling; `None` leaves it to the server.

    Raises:
        InputError: the package `openai` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str,
        *,
        key_env: str | None,
        timeout: float,
        max_retries: int,
        backoff: float,
        temperature: float | None,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise InputError("ApiJudge needs the package openai; run: pip install 'interp[judge]'") from None
        self.base_url, self.model, self.key_env = base_url, model, key_env
        self.timeout, self.max_retries, self.backoff, self.temperature = timeout, max_retries, backoff, temperature
        self.n_requests = 0
        self.stop = threading.Event()
        self._key = key
        self._errors = openai
        # Our own retries: one place that counts them, reads Retry-After and stops all workers at once.
        self._client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0)
        self._level = 0  # of FORMATS
        self._refused: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Server({self.base_url!r}, {self.model!r})"

    def ask(self, messages: Messages, schema: dict[str, Any], kind: str, max_tokens: int) -> Reply:
        """One reply, after as many tries as it takes.

        Args:
            messages: of the chat.
            schema: JSON schema of the reply.
            kind: the schema's name.
            max_tokens: longest reply.

        Raises:
            ResourceError: no connection, a refusal, or failures until the tries are used up.
        """
        openai = self._errors
        tries, level = 0, self._level
        while True:
            if self.stop.is_set():
                raise Stopped("another request failed")
            with self._lock:
                self.n_requests += 1
            try:
                given = self._parameters(messages, schema, kind, max_tokens, level)
                found = self._client.chat.completions.create(**given)
                choice = found.choices[0]
                self._level = max(self._level, level)  # what was accepted
                return Reply(self.blanked(choice.message.content or ""), choice.finish_reason == "length")
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._leaves_out(_said(error), given):
                    if level == len(FORMATS) - 1:
                        raise self._refusal("refuses the request", error) from None
                    level += 1
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                key = f"the key of {self.key_env}" if self.key_env else "a request without a key"
                raise self._refusal(f"refuses {key}", error) from None
            except openai.APIStatusError as error:
                tries = self._after_status(error, tries)
            except openai.APIConnectionError as error:  # time-outs too
                if tries >= self.max_retries:
                    timed_out = isinstance(error, openai.APITimeoutError)
                    what = f"no answer within {self.timeout:g} s" if timed_out else "no connection"
                    raise ResourceError(
                        f"the judge at {self.base_url} cannot be reached: {what} in {tries + 1} tries"
                    ) from None
                tries = self._wait(tries, None)
            except (openai.OpenAIError, ValueError, TypeError, AttributeError, IndexError):
                return Reply("", False)

    def blanked(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, "[key]") if self._key else text

    def _parameters(
        self, messages: Messages, schema: dict[str, Any], kind: str, max_tokens: int, level: int
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model, "messages": messages}
        # OpenAI's newer models refuse the old name, older servers do not know the new one.
        found["max_completion_tokens" if "max_tokens" in self._refused else "max_tokens"] = max_tokens
        if self.temperature is not None and "temperature" not in self._refused:
            found["temperature"] = self.temperature
        if FORMATS[level] == "json_schema":
            wanted = {"name": kind, "schema": schema, "strict": True}
            found["response_format"] = {"type": "json_schema", "json_schema": wanted}
        elif FORMATS[level] == "json_object":
            found["response_format"] = {"type": "json_object"}
        return found

    def _leaves_out(self, message: str, given: dict[str, Any]) -> bool:
        """Whether the server complains of a parameter that was given and that we can do without."""
        named = [name for name in ("max_tokens", "temperature") if name in message and name in given]
        self._refused.update(named)
        return bool(named)

    def _after_status(self, error: Any, tries: int) -> int:
        """Waits after a failure that may pass; raises after any other, or the last try."""
        status, wait = error.status_code, _retry_after(error.response.headers)
        passes = (status in (408, 409, 429) or status >= 500) and error.code != "insufficient_quota"
        if passes and tries < self.max_retries and (wait or 0) <= LONGEST_WAIT:
            return self._wait(tries, wait)
        what = f"answers {status}" + (f" in {tries + 1} tries" if tries else "")
        if wait:
            what += f" and asks to wait {wait:.0f} s"
        raise self._refusal(what, error) from None

    def _wait(self, tries: int, wanted: float | None) -> int:
        pause = self.backoff * 2**tries * (1 + 0.25 * random.random()) if wanted is None else wanted
        self.stop.wait(min(pause, LONGEST_WAIT))
        return tries + 1

    def _refusal(self, what: str, error: Exception) -> ResourceError:
        return ResourceError(f"the judge at {self.base_url} {what}: {self.blanked(_said(error))!r:.400}")


def _said(error: Any) -> str:
    """What the server said; `openai`'s own message holds it only where it has the form of OpenAI's."""
    try:
        return error.response.text.strip() or str(error)
    except (AttributeError, RuntimeError, ValueError):  # no response, or one that was not read
        return str(error)


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which may be a number or a date."""
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
