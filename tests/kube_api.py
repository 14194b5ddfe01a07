"""A double of the Kubernetes API server for the real kubectl: discovery, create, server-side apply, get, list
by label, delete, exec over WebSocket; a bearer token; RayJobs checked as the real server checks them.

What it is not: server-side apply replaces the object (one field manager), nothing is scheduled, and no
operator runs: a test plays it with ``set_status`` and ``execute``.
"""

import asyncio
import copy
import json
import secrets
import ssl
import subprocess
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests import kubernetes

KINDS = {  # plural -> (group/version, kind, namespaced)
    "rayjobs": ("ray.io/v1", "RayJob", True),
    "rayclusters": ("ray.io/v1", "RayCluster", True),
    "configmaps": ("v1", "ConfigMap", True),
    "secrets": ("v1", "Secret", True),
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim", True),
    "serviceaccounts": ("v1", "ServiceAccount", True),
    "pods": ("v1", "Pod", True),
    "namespaces": ("v1", "Namespace", False),
    "nodes": ("v1", "Node", False),
    "networkpolicies": ("networking.k8s.io/v1", "NetworkPolicy", True),
    "customresourcedefinitions": ("apiextensions.k8s.io/v1", "CustomResourceDefinition", False),
}
START_S = 0.05
"""Of a process in a container. kubectl before 1.34 loses what is said before it has opened its streams, which
no real process is fast enough for (https://github.com/kubernetes/kubernetes/pull/131203)."""
Execute = Callable[[str, list[str]], tuple[str, int]]  # (pod, argv) -> (standard output, exit code)


class KubeApi:
    """Serves in a thread of its own; ``objects`` is (plural, name) -> object, all in one namespace."""

    def __init__(self, folder: Path, execute: Execute) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: list[str] = []  # "POST rayjobs", in order
        self.refused: set[str] = set()  # plurals that nobody may write
        self.token = secrets.token_hex(16)
        self._execute = execute
        self._certificate, self._key = folder / "certificate.pem", folder / "key.pem"
        subprocess.run(  # kubectl sends no token over plain HTTP
            ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
             "-keyout", self._key, "-out", self._certificate, "-days", "1", "-subj", "/CN=127.0.0.1",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            check=True, capture_output=True,
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def put(self, plural: str, name: str, **fields: Any) -> None:
        version, kind, _ = KINDS[plural]
        labels = fields.pop("labels", {})
        self.objects[plural, name] = {
            "apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, **fields
        }  # fmt: skip

    def set_status(self, job: str, **status: Any) -> None:
        """What the operator writes into a RayJob."""
        self.objects["rayjobs", job]["status"] = status

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == plural)

    def kubeconfig(self, token: str | None = None, port: int | None = None) -> str:
        return yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "double",
            "clusters": [{"name": "c", "cluster": {
                "server": f"https://127.0.0.1:{port or self.port}",
                "certificate-authority": str(self._certificate),
            }}],
            "users": [{"name": "u", "user": {"token": token or self.token}}],
            "contexts": [{"name": "double", "context": {"cluster": "c", "user": "u"}}],
        })  # fmt: skip

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> int:
        app = web.Application(client_max_size=2**24)
        for path, body in (
            ("/api", {"kind": "APIVersions", "versions": ["v1"]}),
            ("/apis", groups()),
            ("/openapi/v3", schemas()),
        ):
            app.router.add_get(path, always(body))
        for version in {version for version, _, _ in KINDS.values()}:
            path = path_of(version)
            app.router.add_get(f"/openapi/v3/{path}", always(schema(path)))
        for base in ("/api/{version}", "/apis/{group}/{version}"):
            app.router.add_get(base, self._discovery)
            for scope in ("", "/namespaces/{namespace}"):
                kind = f"{base}{scope}/{{plural}}"
                app.router.add_route("*", kind, self._collection)
                app.router.add_route("*", f"{kind}/{{name}}", self._item)
                app.router.add_get(f"{kind}/{{name}}/exec", self._exec)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(self._certificate, self._key)
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return self._runner.addresses[0][1]

    def _refusal(self, request: web.Request) -> web.Response | None:
        plural = request.match_info.get("plural", "")
        self.requests.append(f"{request.method} {plural}")
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return failure(401, "Unauthorized", "Unauthorized")
        if plural and plural not in KINDS:
            return failure(404, "NotFound", "the server could not find the requested resource")
        if request.method != "GET" and plural in self.refused:
            return failure(403, "Forbidden", f"{plural} is forbidden: User u cannot write them")
        return None

    async def _discovery(self, request: web.Request) -> web.Response:
        version = "/".join(
            part for part in (request.match_info.get("group"), request.match_info["version"]) if part
        )
        found = [
            {"name": plural, "singularName": kind.lower(), "namespaced": scoped, "kind": kind,
             "shortNames": ["crd"] if kind == "CustomResourceDefinition" else [],
             "verbs": ["create", "delete", "get", "list", "patch"]}
            for plural, (own, kind, scoped) in KINDS.items() if own == version
        ]  # fmt: skip
        return answer({"kind": "APIResourceList", "groupVersion": version, "resources": found})

    async def _collection(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        plural = request.match_info["plural"]
        version, kind, _ = KINDS[plural]
        if request.method == "POST":
            document = yaml.safe_load(await request.text())
            if (plural, document["metadata"]["name"]) in self.objects:
                return failure(
                    409, "AlreadyExists", f'{plural} "{document["metadata"]["name"]}" already exists'
                )
            return self._store(plural, document)
        wanted = [pair.split("=", 1) for pair in request.query.get("labelSelector", "").split(",") if pair]
        items = [
            item for (own, _), item in self.objects.items()
            if own == plural and all(item["metadata"].get("labels", {}).get(k) == v for k, v in wanted)
        ]  # fmt: skip
        return answer({"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})

    async def _item(self, request: web.Request) -> web.Response:
        if refusal := self._refusal(request):
            return refusal
        plural, name = request.match_info["plural"], request.match_info["name"]
        known = self.objects.get((plural, name))
        if request.method == "PATCH":
            body = yaml.safe_load(await request.text())
            is_patch = request.content_type == "application/json-patch+json"
            return self._store(plural, json_patched(known, body) if is_patch else body)
        if known is None:
            return failure(404, "NotFound", f'{plural} "{name}" not found')
        if request.method == "DELETE":
            del self.objects[plural, name]
            return answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        return answer(known)

    def _store(self, plural: str, document: dict[str, Any]) -> web.Response:
        name, kind = document["metadata"]["name"], document["kind"]
        if plural in ("rayjobs", "rayclusters") and (wrong := kubernetes.errors(document)):
            return failure(422, "Invalid", f'{kind}.ray.io "{name}" is invalid: {"; ".join(wrong)}')
        status = self.objects.get((plural, name), {}).get("status")
        self.objects[plural, name] = document | ({"status": status} if status else {})
        return answer(document, 201)

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        """v5.channel.k8s.io: the first byte of a message names the stream; 1 is output, 3 the exit status."""
        if refusal := self._refusal(request):
            return refusal
        socket = web.WebSocketResponse(protocols=("v5.channel.k8s.io",))
        await socket.prepare(request)
        await asyncio.sleep(START_S)
        said, code = await asyncio.to_thread(
            self._execute, request.match_info["name"], request.query.getall("command")
        )
        await socket.send_bytes(b"\x01" + said.encode())
        status: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            status |= {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
        await socket.send_bytes(b"\x03" + json.dumps(status).encode())
        await socket.close()
        return socket


def json_patched(known: dict[str, Any] | None, operations: list[dict[str, Any]]) -> dict[str, Any]:
    """RFC 6902, as far as it is used: test, add and replace of the fields of an object."""
    assert known is not None
    document = copy.deepcopy(known)
    for operation in operations:
        *parents, last = operation["path"].split("/")[1:]
        node: Any = document
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        assert operation["op"] == "add" or last in node
        if operation["op"] == "test":
            assert node[last] == operation["value"]
        node[last] = operation["value"]
    return document


def answer(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.json_response(body, status=status)


def always(body: dict[str, Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_: web.Request) -> web.Response:
        return answer(body)

    return handler


def failure(code: int, reason: str, message: str) -> web.Response:
    return answer(
        {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason,
         "message": message, "code": code}, code,
    )  # fmt: skip


def groups() -> dict[str, Any]:
    versions = sorted({version for version, _, _ in KINDS.values() if "/" in version})
    named = [{"groupVersion": version, "version": version.split("/")[1]} for version in versions]
    found = [
        {"name": one["groupVersion"].split("/")[0], "versions": [one], "preferredVersion": one}
        for one in named
    ]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}


def schemas() -> dict[str, Any]:
    """kubectl asks here whether the server validates fields itself."""
    paths = {
        path_of(version): {"serverRelativeURL": f"/openapi/v3/{path_of(version)}"}
        for version, _, _ in KINDS.values()
    }
    return {"paths": paths}


def schema(path: str) -> dict[str, Any]:
    """It does: PATCH takes fieldValidation."""
    patch = {
        f"/{path}/namespaces/{{namespace}}/{plural}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "x-kubernetes-group-version-kind": {
                    "group": version.rpartition("/")[0], "version": version.rpartition("/")[2], "kind": kind,
                },
                "responses": {"200": {"description": "OK"}},
            }
        }
        for plural, (version, kind, _) in KINDS.items() if path_of(version) == path
    }  # fmt: skip
    return {"openapi": "3.0.0", "info": {"title": "double", "version": "1"}, "paths": patch}


def path_of(version: str) -> str:
    return f"apis/{version}" if "/" in version else f"api/{version}"
