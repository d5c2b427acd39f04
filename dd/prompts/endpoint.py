"""An OpenAI-compatible endpoint, used through openai's client. The only importer of openai."""

import json
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

KEPT = "Answers so far are kept: the same command resumes from there"


class NoAnswer(ConnectionError, ValueError):
    """The endpoint could not be reached, or did not answer. The message names its address and what
    to do."""


class Endpoint:
    """``ask(request)``: one chat completion of the endpoint at ``base_url`` (``https://host/v1``).

    The key is read from the environment variable ``api_key_env`` at the first request (None, or an
    empty variable: no key, as for local servers). It is never stored, and it is removed from the
    endpoint's messages. A failed attempt (status 408, 409, 429, 5xx, no connection, nothing within
    ``timeout`` seconds) is repeated ``max_retries`` times, after the seconds of Retry-After if the
    endpoint sends it. ValueError for an address of another form.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str | None = "OPENAI_API_KEY",
        max_retries: int = 5,
        timeout: float = 120,
    ) -> None:
        self.url = _checked_url(base_url)
        self.api_key_env, self.max_retries, self.timeout = api_key_env, max_retries, timeout
        self._client: Any = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"text", "finish", "model", "fingerprint", "tokens"} of the answer to ``request``
        (model, messages, ...); ``text`` may be empty. :class:`NoAnswer` gives the reason, without
        the key."""
        openai, key = _openai(), self._key()
        if self._client is None:
            self._client = openai.OpenAI(
                base_url=self.url,
                api_key=key or "none",
                max_retries=self.max_retries,
                timeout=self.timeout,
            )
        try:
            answer = self._client.chat.completions.create(**request)
        except openai.OpenAIError as error:
            raise NoAnswer(self._explain(openai, error, key)) from None
        # for a body that is not the JSON its Content-Type promises
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise NoAnswer(self._no_completion(getattr(error, "doc", error), key)) from None
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            raise NoAnswer(self._no_completion(answer, key))
        message = getattr(choices[0], "message", None) if choices else None
        return {
            "text": getattr(message, "content", None) or getattr(message, "refusal", None) or "",
            "finish": getattr(choices[0], "finish_reason", None) if choices else None,
            "model": getattr(answer, "model", None),
            "fingerprint": getattr(answer, "system_fingerprint", None),
            "tokens": getattr(getattr(answer, "usage", None), "total_tokens", None),
        }

    def _key(self) -> str:
        key = (os.environ.get(self.api_key_env, "") if self.api_key_env else "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"the key in {self.api_key_env} holds characters that an HTTP header cannot hold; "
                "copy it again, alone"
            )
        return key

    def _no_completion(self, body: Any, key: str) -> str:
        """What came instead of a chat completion: the endpoint's own error if it gives one, without
        the key."""
        # of a completion without choices: only the fields that no completion has
        body = getattr(body, "model_extra", None) or body
        told = body.get("error") if isinstance(body, dict) else None
        told = told.get("message") or told if isinstance(told, dict) else told
        said = " ".join(str(told or body).split())
        said = said.replace(key, "<key>") if key else said
        if told:
            return f"{self.url} answers with an error: {said[:300]!r}. {KEPT}, later"
        return (
            f"{self.url} answers, but not as a chat completion: "
            f"{repr(said[:100]) if said else 'an empty body'}. "
            "Is it the address of an OpenAI-compatible endpoint (it often ends in /v1)? "
            "prompts.base_url sets it"
        )

    def _explain(self, openai: ModuleType, error: Any, key: str) -> str:
        """What went wrong and what to do, without the key."""
        status = getattr(error, "status_code", None)
        cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
        said = " ".join(str(cause or error).split())
        said = (said.replace(key, "<key>") if key else said)[:300]
        tries = f"tried {self.max_retries + 1} time{'s' * (self.max_retries > 0)}"
        if isinstance(error, openai.APITimeoutError):
            return (
                f"{self.url}: no answer within {self.timeout:g} s, {tries}. "
                f"{KEPT}; prompts.timeout gives it longer"
            )
        if isinstance(error, openai.APIConnectionError):
            return (
                f"{self.url}: no connection, {tries} ({said}). "
                f"Is the endpoint running, and prompts.base_url right? {KEPT}"
            )
        if status in (401, 403):
            none = f"a request without a key ({self.api_key_env} is empty)"
            return (
                f"{self.url} refuses {f'the key in {self.api_key_env}' if key else none}: {said}. "
                "Put a valid key into the environment variable of prompts.api_key_env"
            )
        if status == 404:
            return (
                f"{self.url}: {said}. Is prompts.base_url right (it often ends in /v1), "
                "and is prompts.model known there?"
            )
        if status == 429:
            after = error.response.headers.get("retry-after", "")
            wait = f" and to wait {after} s" if after.isdecimal() else ""
            return f"{self.url} asks for fewer requests{wait}, {tries}: {said}. {KEPT}, later"
        if status is not None and status >= 500:
            return f"{self.url} fails, {tries}: {said}. {KEPT}, later"
        return (
            f"{self.url} refuses the request: {said}. "
            "An endpoint without structured output: prompts.json_schema=false; "
            "without a seed or a temperature: prompts.seed=null, prompts.temperature=null"
        )


def _checked_url(url: str) -> str:
    """The address. It must hold no user name, password or query, because it is written to messages
    and files."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(
            "prompts.base_url is not an address; expected https://host/v1 or "
            "http://localhost:11434/v1"
        ) from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"prompts.base_url={where}: "
            "give it without user name, password and the part after ? or #. "
            "A key belongs in the environment variable that prompts.api_key_env names, "
            "never in a setting: settings are written to files"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(
            f"prompts.base_url={url!r}: expected https://host/v1 or http://localhost:11434/v1"
        )
    return url.rstrip("/")


def _openai() -> ModuleType:
    try:
        import openai
    except ModuleNotFoundError:
        raise ValueError(
            "prompts=llm needs openai to ask for more, which is not installed: "
            'pip install -e ".[llm]". '
            "Prompts that are already in the cache need neither it nor a network"
        ) from None
    return openai
