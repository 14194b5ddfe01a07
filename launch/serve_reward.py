"""``quartet serve-reward MODEL``: a reward model as a service that several runs share.

    POST /score   {"samples": [{"id": "7", "prompt": "2+2=", "response": "4", "label": null}]}
              ->  {"scores":  [{"id": "7", "score": 0.83}]}          Authorization: Bearer <token>

Requests that arrive together are scored together: one thread owns the model, and takes whatever waits. The
token is read from a file or QUARTET_REWARD_TOKEN; without one the service only listens on this machine's
loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.secret import Secret

MAX_SAMPLES = 1024  # per request
MAX_CHARACTERS = 1_000_000  # per text

Score = Callable[[list[tuple[str, str]]], list[float]]  # (prompt, response) -> score each


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    prompt: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    response: Annotated[str, Field(max_length=MAX_CHARACTERS)]
    label: str | None = None


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    samples: Annotated[list[Sample], Field(min_length=1, max_length=MAX_SAMPLES)]


class Batcher:
    """Collects what waits while a batch is being scored. One batch at a time; each caller gets its own
    scores.

    ``ask`` puts (texts, future) into the queue; ``run`` takes all that is there, scores it in a thread, and
    resolves the futures. An error of the model goes to every caller of that batch and ends none of the
    others.
    """

    def __init__(self, score: Score, *, max_batch: int) -> None:
        self._score, self._max_batch = score, max_batch
        self._queue: asyncio.Queue[tuple[list[tuple[str, str]], asyncio.Future[list[float]]]] = (
            asyncio.Queue()
        )
        self.batches: list[int] = []  # sizes, newest last

    async def ask(self, texts: list[tuple[str, str]]) -> list[float]:
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        await self._queue.put((texts, answer))
        return await answer

    async def run(self) -> None:
        while True:
            waiting = [await self._queue.get()]
            while not self._queue.empty() and sum(len(texts) for texts, _ in waiting) < self._max_batch:
                waiting.append(self._queue.get_nowait())
            texts = [text for part, _ in waiting for text in part]
            self.batches = [*self.batches[-99:], len(texts)]
            try:
                scores = await asyncio.to_thread(self._score, texts)
            except (ValueError, RuntimeError) as error:
                for _, answer in waiting:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for part, answer in waiting:
                own, scores = scores[: len(part)], scores[len(part) :]
                if not answer.done():  # a caller may have gone
                    answer.set_result(own)


def application(score: Score, *, token: Secret | None, max_batch: int) -> FastAPI:
    batcher = Batcher(score, max_batch=max_batch)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token.reveal()}".encode()):
            raise HTTPException(401, "send the service's token as `Authorization: Bearer ...`")

    async def answer(request: ScoreRequest) -> dict[str, list[dict[str, str | float]]]:
        try:
            scores = await batcher.ask([(s.prompt, s.response) for s in request.samples])
        except (ValueError, RuntimeError) as error:
            raise HTTPException(500, str(error)) from None
        return {"scores": [{"id": s.id, "score": v} for s, v in zip(request.samples, scores, strict=True)]}

    app.post("/score", dependencies=[Depends(authorised)])(answer)
    app.get("/health")(lambda: {"status": "ok"})
    return app


def model_score(path: str, *, dtype: str, max_length: int, device: str, micro_batch_tokens: int) -> Score:
    """Loads the reward model; the texts are tokenized as the run's own prompts and responses are."""
    import torch  # noqa: PLC0415 - after the arguments are known to be right
    from transformers import AutoTokenizer  # noqa: PLC0415

    from actors.reward import Judge  # noqa: PLC0415
    from orchestrator.config import Model  # noqa: PLC0415

    model = Model.model_validate({"path": path, "dtype": dtype, "max_length": max_length})
    worker = Judge(model=model, functions={}, micro_batch_tokens=micro_batch_tokens)
    worker.seed, worker.device = 0, torch.device(device)
    worker.start()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def score(texts: list[tuple[str, str]]) -> list[float]:
        sequences = [
            tokenizer(prompt, add_special_tokens=False).input_ids
            + tokenizer(response, add_special_tokens=False).input_ids
            + [tokenizer.eos_token_id]
            for prompt, response in texts
        ]
        if (long := max(map(len, sequences))) > max_length:
            raise ValueError(f"a sequence has {long} tokens; --max-length is {max_length}")
        scores = worker.score(sequences)
        if wrong := [value for value in scores if not math.isfinite(value)]:
            raise ValueError(
                f"{path} gave {len(wrong)} of {len(scores)} scores that are not finite, e.g. {wrong[0]}"
            )
        return scores

    return score


def read_token(file: str | None, host: str) -> Secret | None:
    """The token; ValueError when the service would listen beyond this machine without one."""
    token = Path(file).read_text().strip() if file else os.environ.get("QUARTET_REWARD_TOKEN", "")
    if not token and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(
            f"--host {host} without a token lets everybody use the service; write one (mode 0600) and give "
            "--token-file, or listen on 127.0.0.1"
        )
    return Secret(token) if token else None


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="quartet serve-reward", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a reward model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8470)
    parser.add_argument("--token-file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-batch", type=int, default=256, help="samples scored at once")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    arguments = parser.parse_args(argv)
    token = read_token(arguments.token_file, arguments.host)
    score = model_score(
        arguments.model, dtype=arguments.dtype, max_length=arguments.max_length, device=arguments.device,
        micro_batch_tokens=arguments.micro_batch_tokens,
    )  # fmt: skip
    app = application(score, token=token, max_batch=arguments.max_batch)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning", access_log=False)
    return 0
