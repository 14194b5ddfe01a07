"""Rewards from services: the client of ``quartet serve-reward``, one more kind of reward beside model and
function.

Callable like a reward function; ``score_all`` asks for many at once. Samples go out in chunks, chunk k
first to URL k modulo N, so the load is even; a URL that fails is tried again after the others, with growing
pauses, until the deadline. An answer that is not exactly one finite number for each id that was asked is an
error, never a guess.
"""

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Question = tuple[str, str, str | None]  # (response, prompt, label), as a reward function takes them

CHUNK = 64  # samples per request
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
TOKEN = "QUARTET_REWARD_TOKEN"
RETRIED = (408, 429, 500, 502, 503, 504)


class RemoteReward:
    """Raises ValueError for a wrong answer or a refused token, RuntimeError when the deadline has passed."""

    def __init__(self, urls: Sequence[str], *, deadline_s: float = 120, token: str | None = None) -> None:
        if not urls or any(not url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(
                f"reward urls {list(urls)} must start with http:// or https://; e.g. http://host:8470"
            )
        self._urls = [url.rstrip("/") + "/score" for url in urls]
        self._deadline_s = deadline_s
        self._token = token or os.environ.get(TOKEN)
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
        for attempt in range(10**9):
            url = self._urls[(start + attempt) % len(self._urls)]
            left = until - time.monotonic()
            if left <= 0:
                raise RuntimeError(
                    f"no reward within {self._deadline_s:g} s; last, {trouble}; is the service up?"
                )
            try:
                return read(self._post(url, body, left), len(samples), url)
            except urllib.error.HTTPError as error:
                trouble = f"{url} answered HTTP {error.code}"
                if error.code in (401, 403):
                    raise ValueError(f"{trouble}: set {TOKEN} to the service's token") from None
                if error.code not in RETRIED:
                    raise ValueError(f"{trouble}: {error.read(500).decode(errors='replace')}") from None
            except (OSError, http.client.HTTPException) as error:
                trouble = f"{url}: {getattr(error, 'reason', error)}"
            if attempt % len(self._urls) == len(self._urls) - 1:  # all have failed once more
                time.sleep(min(pause, max(0.0, until - time.monotonic())))
                pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError("the deadline ends the loop")

    def _post(self, url: str, body: bytes, timeout_s: float) -> bytes:
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())


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
