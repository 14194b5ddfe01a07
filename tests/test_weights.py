"""The checksum, the buckets and the gloo transport: without vLLM."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from actors.weights.checksum import COLUMNS, _by_numpy, _by_torch, checksum
from actors.weights.gloo import GlooSender, connect, join, receive, receive_version
from actors.weights.wire import Address, Slot, TensorMeta, metas, plan

F32 = torch.float32
KNOWN = 1003068777780276413  # of arange(100_000, dtype=int32), on every build and device


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 3, 700, 2 * COLUMNS + 5, 5 * COLUMNS + 3])
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype, length: int) -> None:
    tensor = noise(length).to(dtype)
    before = checksum(tensor)
    bits = tensor.view(torch.uint8)
    for byte in {0, len(bits) // 2, len(bits) - 1}:
        for bit in range(8):
            bits[byte] ^= 1 << bit
            assert checksum(tensor) != before, (byte, bit)
            bits[byte] ^= 1 << bit
    assert checksum(tensor) == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]),  # neighbours in a 64-bit word
        ([1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 4.0]),  # across words
        ([5.0, 1.0, 5.0, -1.0], [5.0, -1.0, 5.0, 1.0]),  # words that differ in bit 63 only
        ([0.0, 1.0, 2.0, 3.0], [-0.0, 1.0, 2.0, 3.0]),
        ([0.0, 7.0], [7.0, 0.0]),
    ],
)
def test_values_and_their_places_both_count(first: list[float], second: list[float]) -> None:
    assert checksum(torch.tensor(first)) != checksum(torch.tensor(second))


def test_swapped_rows_change_the_checksum_wherever_they_lie() -> None:
    tensor = noise(6, 2 * COLUMNS)  # a row of this tensor is a whole row of the checksum
    swapped = tensor[[3, 1, 2, 0, 4, 5]]
    assert checksum(swapped) != checksum(tensor)
    assert checksum(swapped[[3, 1, 2, 0, 4, 5]]) == checksum(tensor)


def test_shape_and_dtype_count_where_the_bytes_are_equal() -> None:
    zeros = torch.zeros(4, 2)
    same_bytes = [zeros, zeros.view(2, 4), zeros.view(torch.int32), torch.zeros(4, 4, dtype=torch.bfloat16)]
    assert len({checksum(tensor) for tensor in same_bytes}) == 4


def test_the_checksum_is_a_known_number_wherever_the_tensor_lies_in_memory() -> None:
    tensor = torch.arange(100_000, dtype=torch.int32)
    assert checksum(tensor) == KNOWN
    moved = torch.empty(400_002, dtype=torch.uint8)[2:].view(torch.uint8)
    moved.copy_(tensor.view(torch.uint8))
    assert checksum(tensor.view(torch.uint8)) == checksum(moved)


@pytest.mark.parametrize("length", [0, 1, 8, 700, 8 * COLUMNS, 40 * COLUMNS + 5])
def test_what_gpus_compute_is_what_cpus_compute(length: int) -> None:
    data = (noise(length) * 1e3).to(torch.uint8)
    assert int(_by_torch(data, 2**63 - 1)) == int(_by_numpy(data, 2**63 - 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_checksum() -> None:
    tensor = noise(70 * COLUMNS + 11).bfloat16()
    assert checksum(tensor.cuda()) == checksum(tensor)


def test_the_checksum_keeps_up_with_the_transport() -> None:
    tensor = noise(16 << 20)
    started = time.process_time()
    checksum(tensor)
    assert tensor.nbytes / (time.process_time() - started) > 0.5e9  # 2 GB/s on a quiet core


def test_buckets_keep_the_order_align_tensors_and_isolate_large_ones() -> None:
    a, b, big, c = (
        TensorMeta(name=n, shape=s) for n, s in [("a", (3,)), ("b", (2, 2)), ("big", (100,)), ("c", ())]
    )
    assert plan([a, b, big, c], F32, 64) == [
        (Slot(meta=a, start=0, stop=12), Slot(meta=b, start=16, stop=32)),
        (Slot(meta=big, start=0, stop=400),),
        (Slot(meta=c, start=0, stop=4),),
    ]


def policy() -> dict[str, Tensor]:
    """2.5 MB, in three buckets of 1 MiB."""
    return {"embed": noise(300, 700), "norm": noise(7), "proj": noise(400, 500).T, "head": noise(1000, 220)}


def receiver(address: Address, rank: int, *, late_s: float = 0.0) -> tuple[int, dict[str, Tensor]]:
    """What a vLLM worker does, without vLLM; ``late_s``: how long it lets the first bucket wait."""
    store = connect(address.host, address.port, address.timeout_s)
    group = join(store, rank, address.world_size, address.timeout_s)
    dtype = getattr(torch, address.dtype)
    version = receive_version(group)
    time.sleep(late_s)  # the sender has filled the next bucket by then
    return version, dict(receive(group, plan(address.tensors, dtype, address.bucket_bytes), dtype))


def in_threads(*calls: Callable[[], object]) -> list[Future]:
    pool = ThreadPoolExecutor(len(calls))
    futures = [pool.submit(call) for call in calls]
    pool.shutdown(wait=True)
    return futures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_receiver_gets_the_bytes_the_sender_summed_up(dtype: torch.dtype) -> None:
    tensors = policy()
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=dtype, bucket_mb=1, timeout_s=20)
    address = sender.open(metas(tensors.items()), world_size=3)
    sent, *received = in_threads(
        lambda: sender.send(tensors.items(), 7),
        lambda: receiver(address, 1),
        lambda: receiver(address, 2, late_s=0.3),
    )
    assert (
        len(plan(address.tensors, dtype, address.bucket_bytes))
        == {torch.float32: 3, torch.bfloat16: 2}[dtype]
    )
    assert sent.result().num_bytes == sum(t.numel() for t in tensors.values()) * dtype.itemsize
    for future in received:
        version, arrived = future.result()
        assert version == sent.result().version == 7
        assert {name: checksum(tensor) for name, tensor in arrived.items()} == sent.result().checksums
        assert all(torch.equal(arrived[name], tensors[name].to(dtype)) for name in tensors)


def test_opening_again_serves_a_new_receiver() -> None:
    tensors = policy()
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=F32, bucket_mb=1, timeout_s=20)
    ports = set()
    for version in (1, 2):
        address = sender.open(metas(tensors.items()), world_size=2)
        ports.add(address.port)
        _, received = in_threads(
            lambda v=version: sender.send(tensors.items(), v), lambda a=address: receiver(a, 1)
        )
        assert received.result()[0] == version
    assert len(ports) == 2


def test_a_receiver_that_never_comes_ends_the_send() -> None:
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=F32, bucket_mb=1, timeout_s=1)
    sender.open(metas(policy().items()), world_size=2)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        sender.send(policy().items(), 1)


def test_who_comes_to_a_sender_that_refuses_learns_it_at_once() -> None:
    """A policy that has been trained since refuses to send what an engine that joins asks for."""
    sender = GlooSender(rank=0, host="127.0.0.1", dtype=F32, bucket_mb=1, timeout_s=20)
    address = sender.open(metas(policy().items()), world_size=3)
    began = time.monotonic()
    refused, *received = in_threads(
        sender.refuse, lambda: receiver(address, 1), lambda: receiver(address, 2, late_s=0.3)
    )
    assert refused.exception() is None
    assert all(isinstance(future.exception(), RuntimeError) for future in received)
    assert time.monotonic() - began < 10


def test_other_tensors_than_announced_are_refused_by_name() -> None:
    sender = GlooSender(rank=1, host="127.0.0.1", dtype=F32, bucket_mb=1)
    sender.open(metas([("a", noise(2)), ("b", noise(3))]), world_size=2)
    with pytest.raises(ValueError, match=r"got b \(4,\); open\(\) announced b \(3,\)"):
        sender.send([("a", noise(2)), ("b", noise(4))], 1)
    with pytest.raises(ValueError, match=r"got nothing None; open\(\) announced b"):
        sender.send([("a", noise(2))], 1)
    with pytest.raises(ValueError, match="got c after the 2 tensors"):
        sender.send([("a", noise(2)), ("b", noise(3)), ("c", noise(1))], 1)


def test_the_gloo_sender_does_not_import_vllm() -> None:
    code = "import sys, actors.weights.gloo; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
