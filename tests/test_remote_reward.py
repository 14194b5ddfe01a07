"""The reward service and its client, over real HTTP on the loopback."""

import contextlib
import json
import os
import re
import socket
import struct
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
from orchestrator.secret import Secret
from tests import tiny
from tests.fakes import prompt, rollout
from tests.models import byte_tokenizer
from tests.ray_head import ROOT, free_port


@contextlib.contextmanager
def service(score, token=None):
    port = free_port()
    app = application(score, token=Secret(token) if token else None, max_batch=256)
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
        assert worker.score_groups([[rollout(prompt())]]) == {
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


# a service that misbehaves


@contextlib.contextmanager
def raw(script):
    """A TCP server that does ``script(socket)`` after each request; yields its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                script(connection)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def silence(connection):
    time.sleep(5)


def drip(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.05)


def cut(connection):
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"scores": [')


@pytest.mark.parametrize("script", [reset, silence, drip, cut])
def test_a_service_that_hangs_drips_or_resets_ends_at_the_deadline_without_a_reward(script, monkeypatch):
    """FAULTS 14."""
    monkeypatch.setattr(remote_reward, "FIRST_PAUSE_S", 0.01)
    began = time.monotonic()
    with raw(script) as url, pytest.raises(RuntimeError, match=r"no reward within 0\.5 s; last, "):
        RemoteReward([url], deadline_s=0.5)("x", "p", None)
    assert 0.4 < time.monotonic() - began < 2


@pytest.mark.parametrize("script", [reset, cut])
def test_another_service_takes_over_from_one_that_breaks_off(script):
    with raw(script) as broken, service(lengths) as good:
        assert RemoteReward([broken, good]).score_all([("x", "p", None)] * 3) == [11.0] * 3


def test_a_huge_answer_is_refused():
    body = b'{"scores": [' + b" " * 2**21
    with answering((200, body)) as (url, _), pytest.raises(ValueError, match="longer than 1048576 bytes"):
        RemoteReward([url])("x", "p", None)


@pytest.mark.parametrize("status", [302, 307])  # urllib would turn the first into a GET, with the token
def test_a_redirect_is_not_followed(status):
    good = {"scores": [{"id": "0", "score": 0.5}]}
    with answering((200, good)) as (elsewhere, seen):

        def move(connection):
            line = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}/score\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(line.encode())

        with raw(move) as url, pytest.raises(ValueError, match=f"HTTP {status}"):
            RemoteReward([url], token="secret")("x", "p", None)
    assert seen == []


def test_a_url_with_a_password_is_refused():
    with pytest.raises(ValueError, match="holds a password") as error:
        RemoteReward(["http://me:hunter2@host"])
    assert "hunter2" not in str(error.value)


def test_a_dead_service_is_left_alone_while_another_answers_and_asked_again_later(monkeypatch):
    monkeypatch.setattr(remote_reward, "REST_S", 0.4)
    good = (200, {"scores": [{"id": "0", "score": 0.5}]})
    failing = [(503, b"")] * 4
    with answering(*failing, good) as (weak, weak_seen), answering(good) as (strong, strong_seen):
        client = RemoteReward([weak, strong])
        for _ in range(12):
            assert client("x", "p", None) == 0.5
        assert (len(weak_seen), len(strong_seen)) == (remote_reward.BREAKS_AFTER, 12)
        time.sleep(0.45)
        assert [client("x", "p", None) for _ in range(2)] == [0.5] * 2  # one more failure, then rest again
        assert len(weak_seen) == remote_reward.BREAKS_AFTER + 1
        time.sleep(0.45)
        before = len(strong_seen)
        assert [client("x", "p", None) for _ in range(4)] == [0.5] * 4  # it answers, and has its share again
        assert (len(weak_seen), len(strong_seen) - before) == (remote_reward.BREAKS_AFTER + 3, 2)
