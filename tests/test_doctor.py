"""The doctor's findings against services and folders that are really there."""

import shutil
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launch import doctor
from launch.doctor import Skipped, Trouble


@pytest.fixture
def ray_api():
    """A dashboard: token "good" or nothing at all; `status`, `version` and `date` can be changed."""

    class Handler(BaseHTTPRequestHandler):
        needs_token, version, date = True, doctor.TESTED["ray"], None

        def do_GET(self):
            known = self.headers.get("Authorization") == "Bearer good"
            self.send_response_only(200 if known or not self.needs_token else 401)
            self.send_header("Date", self.date or self.date_time_string())
            self.end_headers()
            self.wfile.write(f'{{"ray_version": "{self.version}"}}'.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield Handler
    server.shutdown()


def test_a_cluster_that_answers_strangers_is_a_failure(ray_api):
    assert "refused (HTTP 401)" in doctor.ray_refuses(ray_api.address)
    ray_api.needs_token = False
    with pytest.raises(Trouble, match="RAY_AUTH_MODE=token"):
        doctor.ray_refuses(ray_api.address)


def test_a_wrong_token_and_a_wrong_version_are_told_apart(ray_api, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "bad")
    with pytest.raises(Trouble, match="HTTP 401; set RAY_AUTH_TOKEN_PATH"):
        doctor.ray_answers(ray_api.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "good")
    assert doctor.ray_answers(ray_api.address).startswith("Ray 2.60.0")
    ray_api.version = "2.59.0"
    with pytest.raises(Trouble, match=r"runs Ray 2\.59\.0"):
        doctor.ray_answers(ray_api.address)


def test_a_clock_that_is_off_is_named(ray_api):
    assert "within" in doctor.clock(ray_api.address)
    ray_api.date = "Thu, 01 Jan 2026 00:00:00 GMT"
    with pytest.raises(Trouble, match="NTP"):
        doctor.clock(ray_api.address)


def test_too_little_shared_memory_is_named(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64 * 2**20))
    with pytest.raises(Trouble, match=r"0\.06 GiB free.*--shm-size"):
        doctor.shared_memory()


def test_a_library_that_no_wheel_brings_is_named(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    with pytest.raises(doctor.Trouble, match="libnuma1"):
        doctor.libraries()


def test_the_disk_is_measured_and_left_clean(tmp_path):
    assert "MB/s" in doctor.disk(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_nobody_at_the_address_is_a_failure_with_a_remedy():
    with pytest.raises(Trouble, match="cannot be reached"):
        doctor.ray_answers("http://127.0.0.1:9")


def test_any_failure_is_the_exit_status(capsys):
    def fails():
        raise Trouble("do this")

    def skips():
        raise Skipped("not here")

    assert doctor.examine([("a", lambda: "fine"), ("b", skips)]) == 0
    assert doctor.examine([("c", fails), ("d", lambda: "fine")]) == 1
    assert "FAIL  c               do this" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_agree_over_gloo():
    assert "agreed" in doctor.collective("gloo")
