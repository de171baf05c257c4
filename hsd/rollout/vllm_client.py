"""One vLLM server: what is asked of it, and its answers, checked.

Sampling goes through `/inference/v1/generate`, tokens in and tokens out, which also says which
version of the weights sampled each token; control through the development endpoints.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from hsd.rollout.protocol import EngineError, Rollout, Sampling

CONTROL_TIMEOUT = 600.0
"""Seconds for an answer of a development endpoint; loading weights is the longest."""
HEALTH_TIMEOUT = 10.0
_SHOWN = 300  # characters of a server's error


class ServerLost(Exception):
    """A server that does not answer, or not with the weights it should have; another try may help.

    Attributes:
        hung: it took a request and did not answer in time.
    """

    def __init__(self, reason: str, *, hung: bool = False) -> None:
        super().__init__(reason)
        self.hung = hung


class VllmClient:
    """Calls one server; safe to share among threads.

    Args:
        url: http://HOST:PORT.
        request_timeout: seconds for one group of rollouts.
        concurrent: connections at one time.
    """

    def __init__(self, url: str, *, request_timeout: float, concurrent: int) -> None:
        self.url = url
        self._timeout = request_timeout
        # No proxy of the environment stands between this machine and itself.
        self._http = httpx2.Client(
            base_url=url,
            trust_env=False,
            # vLLM closes an idle connection after 5 s, maybe while a request is on its way.
            limits=httpx2.Limits(max_connections=concurrent + 2, keepalive_expiry=2.0),
        )

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=HEALTH_TIMEOUT).status_code == 200
        except httpx2.TransportError:
            return False

    def generate(
        self,
        prompt: Sequence[int],
        *,
        seed: int,
        group_size: int,
        sampling: Sampling,
        stop_ids: Sequence[int],
        label: str,
        version: int,
    ) -> list[Rollout]:
        """A group of rollouts.

        Args:
            label: of the weights that have to sample them.

        Raises:
            ServerLost: no answer, or other weights.
            EngineError: the request was refused, or the answer is malformed.
        """
        body = _request(prompt, seed, group_size, sampling, stop_ids)
        answer = self._post("/inference/v1/generate", body, timeout=self._timeout)
        choices = _choices(answer, group_size, self.url)
        for choice in choices:
            spans = _field(choice, "weight_versions", list, self.url)
            found = {_field(span, "version", str, self.url) for span in spans}
            if found != {label}:
                raise ServerLost(f"it sampled from weights {sorted(found)}, expected {label}")
        return [_rollout(choice, sampling, stop_ids, version, self.url) for choice in choices]

    def top_logprobs(self, prompt: Sequence[int], *, temperature: float) -> dict[int, float]:
        """The most likely first tokens of a response and their log-probs as reported, nats."""
        body = _request(prompt, 0, 1, Sampling(max_new_tokens=1, temperature=temperature), [])
        body["sampling_params"]["logprobs"] = 5
        answer = self._post("/inference/v1/generate", body, timeout=self._timeout)
        (choice,) = _choices(answer, 1, self.url)
        (first,) = _content(choice, self.url)
        listed = _field(first, "top_logprobs", list, self.url)
        return {
            _field(each, "token_id", int, self.url): _logprob(each, self.url) for each in listed
        }

    def load(self, path: str) -> None:
        """Replaces the weights by those in a directory that the server sees."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self._post("/collective_rpc", body)

    def name_weights(self, label: str) -> None:
        """Forgets keys and values of other weights, and labels what is sampled from now on."""
        self._reset_prefix_cache()
        self._post("/update_weight_version", {"new_version": label})

    def _reset_prefix_cache(self) -> None:
        # Blocks are held until an abandoned request has ended.
        deadline = time.monotonic() + CONTROL_TIMEOUT
        while not _field(self._post("/reset_prefix_cache", {}), "success", bool, self.url):
            if time.monotonic() > deadline:
                raise ServerLost("its prefix cache cannot be reset: requests do not end", hung=True)
            time.sleep(0.2)

    def weights_label(self) -> str:
        """The label that it was last given, "default" after its start."""
        label: str = _field(self._get("/weight_info"), "weight_version", str, self.url)
        return label

    def workers(self) -> int:
        """Its processes that hold weights."""
        count: int = _field(self._get("/get_world_size"), "world_size", int, self.url)
        return count

    def sleep(self) -> None:
        """Discards weights and cache (level 2)."""
        self._post("/sleep?level=2", {})

    def wake(self, tag: str) -> None:
        """Allocates "weights" or "kv_cache" again."""
        self._post(f"/wake_up?tags={tag}", {})

    def _get(self, path: str) -> Any:
        return self._call("GET", path, None, HEALTH_TIMEOUT)

    def _post(self, path: str, body: Mapping[str, Any], timeout: float = CONTROL_TIMEOUT) -> Any:
        return self._call("POST", path, body, timeout)

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        limits = httpx2.Timeout(timeout, connect=HEALTH_TIMEOUT)
        try:
            response = self._http.request(method, path, json=body, timeout=limits)
        except httpx2.TimeoutException as error:
            raise ServerLost(f"{path}: no answer after {timeout:g} s", hung=True) from error
        except httpx2.TransportError as error:
            raise ServerLost(f"{path}: {type(error).__name__}: {error}") from error
        shown = f"{path}: status {response.status_code}: {response.text[:_SHOWN]}"
        if response.status_code >= 500:
            raise ServerLost(shown)
        if response.status_code != 200:
            raise EngineError(f"engine: {self.url} refused {shown}{_remedy(response.status_code)}")
        try:
            return response.json()
        except ValueError:
            raise _malformed(self.url, response.text, "JSON") from None


def _request(
    prompt: Sequence[int],
    seed: int,
    group_size: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> dict[str, Any]:
    return {
        "token_ids": list(prompt),
        "sampling_params": {
            "n": group_size,
            "seed": seed % 2**62,  # the rollouts of a group are given the next ones
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "logprobs": 0,
            "stop_token_ids": list(stop_ids),
            "detokenize": False,
            # The server's or the model's own defaults would change the policy unseen.
            "top_k": 0,
            "min_p": 0.0,
            "min_tokens": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        },
    }


def _choices(answer: Any, count: int, url: str) -> list[Any]:
    choices = _field(answer, "choices", list, url)
    ordered = sorted(choices, key=lambda each: int(_field(each, "index", int, url)))
    if [each["index"] for each in ordered] != list(range(count)):
        raise _malformed(url, answer, f"{count} choices")
    return ordered


def _content(choice: Any, url: str) -> list[Any]:
    content: list[Any] = _field(_field(choice, "logprobs", dict, url), "content", list, url)
    return content


def _rollout(
    choice: Any, sampling: Sampling, stop_ids: Sequence[int], version: int, url: str
) -> Rollout:
    tokens = _field(choice, "token_ids", list, url)
    content = _content(choice, url)
    length = len(tokens)
    if not 1 <= length <= sampling.max_new_tokens or tokens != [
        _field(each, "token_id", int, url) for each in content
    ]:
        raise _malformed(url, choice, f"1 to {sampling.max_new_tokens} tokens with log-probs")
    reason = _field(choice, "finish_reason", str, url)
    if reason == "abort":
        raise ServerLost("it aborted the request")
    if reason not in ("stop", "length") or (reason == "stop") != (tokens[-1] in stop_ids):
        raise _malformed(url, choice, "stop at a stop token, else length")
    return Rollout(
        token_ids=tuple(tokens),
        logprobs=tuple(_logprob(each, url) for each in content),
        loss_mask=(True,) * length,
        finish_reason="stop" if reason == "stop" else "length",
        policy_version=version,
    )


def _logprob(entry: Any, url: str) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _malformed(url, entry, "a finite logprob")
    return float(value)


def _field(record: Any, name: str, kind: type, url: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _malformed(url, record, f"{name} of type {kind.__name__}")
    return value


def _malformed(url: str, found: Any, expected: str) -> EngineError:
    return EngineError(f"engine: {url} answered {str(found)[:_SHOWN]!r}, expected {expected}")


def _remedy(status: int) -> str:
    if status in (403, 404, 405):
        return " (a server is to be started with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out)"
    return ""
