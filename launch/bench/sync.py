"""Weight sync on CPUs: the real sender and receivers in processes of their own, against a plain copy.

copy     the same bytes through one loopback socket, from memory to memory, nothing else
sync     cast, buckets, broadcast and the checksums of both ends; vLLM's loading is not in it
fan-out  the same to several receivers: gloo broadcasts along a binomial tree, so that N receivers take
         ceil(log2(N + 1)) rounds, not N
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from actors.weights.checksum import digest, resolve
from actors.weights.gloo import GlooSender, connect, join, receive, receive_version
from actors.weights.wire import Address, TensorMeta, plan
from launch.bench.result import Figure

LAYERS, HIDDEN, INNER, VOCAB = 12, 576, 1536, 49152  # of SmolLM2-135M, fewer layers: 65M parameters
BUCKET_MB = 64  # engine.bucket_mb
ROUNDS = 6  # the first opens the connections
RECEIVERS = (1, 2, 4)
SIZES = {
    "layers": LAYERS, "hidden": HIDDEN, "inner": INNER, "vocab": VOCAB, "bucket_mb": BUCKET_MB,
    "receivers": RECEIVERS, "rounds": ROUNDS,
}  # fmt: skip
TIMEOUT_S = 120.0


def shapes() -> list[TensorMeta]:
    metas = [TensorMeta(name="embed", shape=(VOCAB, HIDDEN))]
    for layer in range(LAYERS):
        metas += [TensorMeta(name=f"{layer}.attention", shape=(4, HIDDEN, HIDDEN))]
        metas += [TensorMeta(name=f"{layer}.mlp.{name}", shape=(INNER, HIDDEN)) for name in ("up", "gate")]
        metas += [TensorMeta(name=f"{layer}.mlp.down", shape=(HIDDEN, INNER))]
        metas += [TensorMeta(name=f"{layer}.norm", shape=(HIDDEN,))]
    return metas


def sync_seconds(num_receivers: int, dtype: torch.dtype) -> tuple[list[float], int]:
    """Seconds of each sync but the first, from the start of the send until every receiver has all checksums;
    and its bytes. RuntimeError when a receiver got other bytes."""
    generator = torch.Generator().manual_seed(0)
    weights = [(meta.name, torch.randn(meta.shape, generator=generator)) for meta in shapes()]
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=dtype, bucket_mb=BUCKET_MB, timeout_s=TIMEOUT_S)
    address = sender.open(shapes(), world_size=1 + num_receivers)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(num_receivers)]
    processes = [
        context.Process(target=_receiver, args=(address, rank + 1, far)) for rank, (_, far) in enumerate(ends)
    ]
    for process in processes:
        process.start()
    seconds, sent = [], 0
    try:
        for near, _ in ends:
            near.recv()  # it is there
        for version in range(ROUNDS):
            start = time.perf_counter()
            receipt = sender.send(weights, version)
            answers = [near.recv() for near, _ in ends]
            seconds.append(time.perf_counter() - start)
            sent = receipt.num_bytes
            if any(answer != receipt.checksums for answer in answers):
                raise RuntimeError("a receiver got other bytes than were sent")
    finally:
        for process in processes:
            process.join(timeout=10)
        sender.close()
    return seconds[1:], sent


def _receiver(address: Address, rank: int, far: Connection) -> None:
    """What an engine's worker does, without the engine."""
    torch.set_num_threads(1)
    store = connect(address.host, address.port, address.timeout_s)
    far.send("here")
    group = join(store, rank, address.world_size, address.timeout_s)
    dtype = getattr(torch, address.dtype)
    buckets = plan(address.tensors, dtype, address.bucket_bytes)
    for _ in range(ROUNDS):
        receive_version(group)
        far.send(resolve({name: digest(tensor) for name, tensor in receive(group, buckets, dtype)}))


def copy_seconds(num_bytes: int) -> list[float]:
    """Of a plain copy of as many bytes to another process."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = context.Process(target=_swallow, args=(server.getsockname()[1], num_bytes))
        process.start()
        connection, _ = server.accept()
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    with connection:
        seconds = list(_copies(connection, source))
    process.join(timeout=10)
    return seconds[1:]


def _copies(connection: socket.socket, source: Tensor) -> Iterator[float]:
    for _ in range(ROUNDS):
        start = time.perf_counter()
        connection.sendall(memoryview(source.numpy()))
        connection.recv(1)  # it has arrived
        yield time.perf_counter() - start


def _swallow(port: int, num_bytes: int) -> None:
    target = memoryview(bytearray(num_bytes))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(ROUNDS):
            at = 0
            while at < num_bytes:
                at += connection.recv_into(target[at:])
            connection.sendall(b"1")


def measure() -> list[Figure]:
    torch.set_num_threads(1)
    figures: list[Figure] = []
    fan_out = "seconds of a sync by receivers (bfloat16)"
    for num_receivers in RECEIVERS:
        seconds, num_bytes = sync_seconds(num_receivers, torch.bfloat16)
        figures.append(
            Figure(
                name=f"sync/seconds/{num_receivers}_receivers", unit="s", better="lower", samples=seconds,
                at=(fan_out, num_receivers),
            )
        )  # fmt: skip
        if num_receivers == 1:
            copies = copy_seconds(num_bytes)
            ratios = [second / copy for second, copy in zip(seconds, copies, strict=True)]
            rates = [num_bytes / second for second in seconds]
            figures += [
                Figure(name="sync/bytes_per_s", unit="B/s", better="higher", samples=rates),
                Figure(name="sync/copy_s", unit="s", better="neither", samples=copies),
                Figure(
                    name="sync/times_a_copy", unit="x", better="lower", samples=ratios,
                    target="<= 3 times a copy of the same bytes between two processes",
                ),
            ]  # fmt: skip
    return figures
