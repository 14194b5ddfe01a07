"""Rewards from services: the client of ``quartet serve-reward``, one more kind of reward beside model and
function.

Callable like a reward function; ``score_all`` asks for many at once. Samples go out in chunks, chunk k
first to URL k modulo N, so the load is even. A URL that fails is tried again after the others, with growing
pauses of random length (several runs must not come back at the same moment), until the deadline; one that
failed BREAKS_AFTER times in a row is passed over for REST_S while another one answers, then one request at a
time may try it. An answer that is not exactly one finite number for each id that was asked is an error,
never a guess.
"""

import http.client
import json
import math
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NoReturn
from urllib.parse import urlsplit

from orchestrator.secret import Secret

Question = tuple[str, str, str | None]  # (response, prompt, label), as a reward function takes them

CHUNK = 64  # samples per request
MAX_ANSWER_BYTES = 2**20  # of a chunk: 64 scores are 3 kB
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
BREAKS_AFTER, REST_S = 3, 30.0
TOKEN = "QUARTET_REWARD_TOKEN"
RETRIED = (408, 429, 500, 502, 503, 504)


class Breaker:
    """Whether a URL is worth a request."""

    def __init__(self) -> None:
        self._lock, self._failures, self._rests_until = Lock(), 0, 0.0

    def ready(self) -> bool:
        """True for all while the URL answers; while it does not, for one caller every REST_S."""
        with self._lock:
            if self._failures < BREAKS_AFTER:
                return True
            if time.monotonic() < self._rests_until:
                return False
            self._rests_until = time.monotonic() + REST_S
            return True

    def answered(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= BREAKS_AFTER:
                self._rests_until = time.monotonic() + REST_S


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect would carry samples and token to a host that nobody configured."""

    def redirect_request(self, *_: Any) -> None:
        return None


class RemoteReward:
    """Raises ValueError for a wrong answer or a refused token, RuntimeError when the deadline has passed."""

    def __init__(self, urls: Sequence[str], *, deadline_s: float = 120, token: str | None = None) -> None:
        if not urls or any(not url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(
                f"reward urls {list(urls)} must start with http:// or https://; e.g. http://host:8470"
            )
        if any(urlsplit(url).password for url in urls):
            raise ValueError(f"a reward url holds a password, which logs would show; set {TOKEN} instead")
        self._urls = [url.rstrip("/") + "/score" for url in urls]
        self._breakers = [Breaker() for _ in urls]
        self._open = urllib.request.build_opener(_StayHere).open
        self._deadline_s = deadline_s
        self._token = Secret(token or os.environ.get(TOKEN, ""))
        self._asked = 0  # chunks so far: where the next one starts

    def __call__(self, response: str, prompt: str, label: str | None) -> float:
        return self.score_all([(response, prompt, label)])[0]

    def score_all(self, questions: Sequence[Question]) -> list[float]:
        """One finite reward per question, in their order."""
        chunks = [questions[i : i + CHUNK] for i in range(0, len(questions), CHUNK)]
        starts = [self._asked + k for k in range(len(chunks))]
        self._asked += len(chunks)
        until = time.monotonic() + self._deadline_s
        with ThreadPoolExecutor(max_workers=2 * len(self._urls)) as pool:
            answers = pool.map(lambda item: self._chunk(*item, until), zip(chunks, starts, strict=True))
            return [score for answer in answers for score in answer]

    def _chunk(self, questions: Sequence[Question], start: int, until: float) -> list[float]:
        samples = [
            {"id": str(k), "prompt": prompt, "response": response, "label": label}
            for k, (response, prompt, label) in enumerate(questions)
        ]
        body, pause, trouble = json.dumps({"samples": samples}).encode(), FIRST_PAUSE_S, "nothing asked yet"
        order = [(start + k) % len(self._urls) for k in range(len(self._urls))]
        while time.monotonic() < until:
            for index in [k for k in order if self._breakers[k].ready()] or order[:1]:
                url, breaker = self._urls[index], self._breakers[index]
                try:
                    scores = read(self._post(url, body, until), len(samples), url)
                except urllib.error.HTTPError as error:
                    trouble = f"{url} answered HTTP {error.code}"
                    if error.code not in RETRIED:
                        _refuse(trouble, error)
                except (OSError, http.client.HTTPException) as error:
                    trouble = f"{url}: {getattr(error, 'reason', error)}"
                else:
                    breaker.answered()
                    return scores
                breaker.failed()
                if time.monotonic() >= until:
                    break
            # All have failed once more. Full jitter: several runs must not come back together.
            time.sleep(min(random.uniform(pause / 2, pause), max(0.0, until - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise RuntimeError(f"no reward within {self._deadline_s:g} s; last, {trouble}; is the service up?")

    def _post(self, url: str, body: bytes, until: float) -> bytes:
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token.reveal()}")
        with self._open(request, timeout=max(0.01, until - time.monotonic())) as answer:
            return _whole(answer, until)


def _whole(answer: http.client.HTTPResponse, until: float) -> bytes:
    """The body; a socket's timeout is of one read, and a service that drips would never meet it."""
    parts: list[bytes] = []
    while part := answer.read1(2**16):
        parts.append(part)
        if sum(map(len, parts)) > MAX_ANSWER_BYTES:
            raise ValueError(
                f"the answer is longer than {MAX_ANSWER_BYTES} bytes, for {CHUNK} scores at most"
            )
        if time.monotonic() > until:
            raise TimeoutError("the answer dripped on after the deadline")
    body = b"".join(parts)
    if len(body) < int(answer.headers.get("Content-Length") or 0):
        raise http.client.IncompleteRead(body)
    return body


def _refuse(trouble: str, error: urllib.error.HTTPError) -> NoReturn:
    """Asking again would give the same answer."""
    if error.code in (401, 403):
        raise ValueError(f"{trouble}: set {TOKEN} to the service's token") from None
    raise ValueError(f"{trouble}: {error.read(500).decode(errors='replace')}") from None


def read(body: bytes, count: int, url: str) -> list[float]:
    """The scores of ids "0" to ``count - 1`` in this order, whatever the order of the answer."""
    try:
        rows: Any = json.loads(body)["scores"]
        found = {row["id"]: row["score"] for row in rows}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{url} answered {body[:200]!r}; expected {{"scores": [{{"id", "score"}}]}}'
        ) from None
    wanted = [str(k) for k in range(count)]
    if len(rows) != count or set(found) != set(wanted):
        raise ValueError(
            f"{url} answered {len(rows)} scores with ids {sorted(found)[:5]}...; {count} were asked"
        )
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{url} gave sample {name} the score {value!r}; expected a finite number")
    return [float(found[name]) for name in wanted]
