"""The reward service and its client, over real HTTP on the loopback."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import uvicorn
from transformers import LlamaForSequenceClassification

from actors import remote_reward
from actors.remote_reward import CHUNK, RemoteReward
from actors.reward import Judge
from actors.reward_function import find_reward_function
from launch.serve_reward import application, read_token
from tests import tiny
from tests.fakes import prompt, rollout
from tests.models import byte_tokenizer
from tests.ray_head import ROOT, free_port


@contextlib.contextmanager
def service(score, token=None):
    port = free_port()
    app = application(score, token=token, max_batch=256)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def answering(*answers):
    """A service that gives these (status, body) in turn and repeats the last; yields (url, number of
    requests)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = answers[min(len(seen), len(answers) - 1)]
            seen.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()


def lengths(texts):
    return [float(10 * len(prompt) + len(response)) for prompt, response in texts]


def test_each_question_gets_its_own_score_across_chunks_and_services():
    questions = [("x" * k, "pp", None) for k in range(2 * CHUNK + 5)]
    with service(lengths, token="t") as one, service(lengths, token="t") as two:
        scores = RemoteReward([one, two], token="t").score_all(questions)
    assert scores == [20.0 + k for k in range(2 * CHUNK + 5)]


def test_chunks_are_spread_evenly_over_the_services():
    seen = {"a": [], "b": []}
    with (
        service(lambda t: (seen["a"].append(len(t)), lengths(t))[1]) as one,
        service(lambda t: (seen["b"].append(len(t)), lengths(t))[1]) as two,
    ):
        client = RemoteReward([one, two])
        for _ in range(6):
            client("x", "p", None)
    assert (len(seen["a"]), len(seen["b"])) == (3, 3)


def test_a_wrong_token_is_refused_and_named():
    with service(lengths, token="right") as url, pytest.raises(ValueError, match="QUARTET_REWARD_TOKEN"):
        RemoteReward([url], token="wrong")("x", "p", None)


def test_requests_that_wait_are_scored_in_one_batch():
    sizes = []

    def slow(texts):
        sizes.append(len(texts))
        time.sleep(0.3)
        return lengths(texts)

    with service(slow) as url:
        client = RemoteReward([url])
        threads = [threading.Thread(target=client, args=("x", "p", None)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(sizes) == 8 and len(sizes) <= 3, sizes


def test_a_busy_service_is_asked_again_and_a_dead_one_is_passed_over(monkeypatch):
    monkeypatch.setattr(remote_reward, "FIRST_PAUSE_S", 0.01)
    good = (200, {"scores": [{"id": "0", "score": 0.5}]})
    with answering((503, b""), (429, b""), good) as (url, seen):
        assert RemoteReward(["http://127.0.0.1:9", url])("x", "p", None) == 0.5
    assert len(seen) == 3


def test_the_deadline_ends_the_asking():
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no reward within 0\.5 s"):
        RemoteReward(["http://127.0.0.1:9"], deadline_s=0.5)("x", "p", None)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "body",
    [
        {"scores": []},
        {"scores": [{"id": "1", "score": 1.0}]},
        {"scores": [{"id": "0", "score": 1.0}, {"id": "0", "score": 2.0}]},
        {"scores": [{"id": "0", "score": "1"}]},
        {"scores": [{"id": "0", "score": True}]},
        b'{"scores": [{"id": "0", "score": NaN}]}',
        b'{"scores": [{"id": "0", "score": Infinity}]}',
        {"score": 1.0},
        b"<html>",
    ],
)
def test_an_answer_that_is_not_exactly_what_was_asked_is_an_error(body):
    with answering((200, body)) as (url, seen), pytest.raises(ValueError, match=re.escape(url)):
        RemoteReward([url])("x", "p", None)
    assert len(seen) == 1


def test_scores_follow_the_ids_and_not_the_order_of_the_answer():
    body = {"scores": [{"id": "1", "score": 1.5}, {"id": "0", "score": 0.5}]}
    with answering((200, body)) as (url, _):
        assert RemoteReward([url]).score_all([("a", "p", None), ("b", "p", None)]) == [0.5, 1.5]


def test_a_url_is_a_reward_like_a_function():
    with service(lengths) as url:
        worker = Judge(model=None, functions={"far": url}, micro_batch_tokens=1)
        worker.start()
        assert worker.score_rollouts([rollout(prompt())]) == {
            "far": [find_reward_function(url)("b", "a", "b")]
        }


def test_a_service_beyond_the_loopback_needs_a_token(monkeypatch):
    monkeypatch.delenv("QUARTET_REWARD_TOKEN", raising=False)
    assert read_token(None, "127.0.0.1") is None
    with pytest.raises(ValueError, match="--token-file"):
        read_token(None, "0.0.0.0")


@pytest.fixture
def reward_model(tmp_path):
    """A classifier with one label and random weights, and its tokenizer, in a folder."""
    tokenizer = byte_tokenizer()
    config = tiny.llama(vocab=len(tokenizer) + 1)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config).eval()
    model.score.weight.data.normal_()
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward", model, tokenizer


@pytest.mark.slow
def test_the_command_serves_a_reward_model_whose_scores_are_transformers_own(reward_model, tmp_path):
    folder, model, tokenizer = reward_model
    (tmp_path / "token").write_text("of-the-service")
    port = free_port()
    command = [sys.executable, "-m", "launch.cli", "serve-reward", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-length", "64", "--micro-batch-tokens", "40"]
    command += ["--token-file", str(tmp_path / "token")]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        try:
            client = RemoteReward([f"http://127.0.0.1:{port}"], token="of-the-service")
            questions = [("x" * k, "2+2=", None) for k in range(1, 30)]
            scores = client.score_all(questions)  # asks again until the server is up
            with pytest.raises(ValueError, match="QUARTET_REWARD_TOKEN"):
                RemoteReward([f"http://127.0.0.1:{port}"], token="another").score_all(questions[:1])
        finally:
            server.terminate()
            said = server.communicate(timeout=30)[0]
    assert "of-the-service" not in said
    for (response, asked, _), score in zip(questions, scores, strict=True):
        tokens = torch.tensor([[*tokenizer(asked + response).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            assert score == pytest.approx(model(tokens).logits.item(), rel=1e-4, abs=1e-5)
