"""Proves that two processes hold the same bytes: a checksum of a tensor that is exact and equal on CPUs and
GPUs.

All arithmetic is on integers modulo 2^64, so neither the order of a reduction nor the device can change it:

    sum over rows r, columns c of   (2r + 1) * w[c] * (x[r, c] + (x[r, c] >> 32))   +  hash of dtype and shape

where x are the bytes in words of 64 bits, ``COLUMNS`` to a row, and w[c] odd and scattered. Odd factors make
a change of any one bit visible; different factors make a swap visible. The shift brings the high half, where
a float's sign lies, down: otherwise exchanging 1.0 and -1.0 would move only bit 63, which the even difference
of two odd factors multiplies to zero.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

COLUMNS = 1 << 14  # 128 KiB a row: the temporary stays in a core's cache; 3 GB/s on one core
_GPU_ROWS = 256  # 32 MiB: few launches


def checksum(tensor: Tensor) -> int:
    """A signed 64-bit number."""
    return int(digest(tensor))


def resolve(digests: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers of many digests with one transfer from the device."""
    if not digests:
        return {}
    return dict(zip(digests, torch.stack(list(digests.values())).tolist(), strict=True))


def digest(tensor: Tensor) -> Tensor:
    """[] int64 on the tensor's device, computed without waiting for the device."""
    label = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    start = int.from_bytes(hashlib.blake2b(label, digest_size=8).digest(), "big", signed=True)
    total = torch.full((), start, dtype=torch.int64, device=tensor.device)
    weights = _weights(tensor.device)
    for first_row, words in _rows(tensor.detach().contiguous().reshape(-1).view(torch.uint8)):
        mixed = (words >> 32).add_(words).mul_(weights[: words.shape[1]])
        factors = torch.arange(first_row, first_row + len(words), device=tensor.device).mul_(2).add_(1)
        total += mixed.sum(1).mul_(factors).sum()
    return total


def _rows(data: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, [rows, COLUMNS] int64), the last one [1, less], padded with zero bytes to whole words."""
    row_bytes = COLUMNS * 8
    whole = data.numel() // row_bytes
    step = 1 if data.device.type == "cpu" else _GPU_ROWS
    for row in range(0, whole, step):
        rows = data[row * row_bytes : min(row + step, whole) * row_bytes]
        yield row, _words(rows).view(-1, COLUMNS)
    tail = data[whole * row_bytes :]
    if tail.numel():
        yield whole, _words(torch.nn.functional.pad(tail, (0, -tail.numel() % 8))).view(1, -1)


def _words(data: Tensor) -> Tensor:
    """A view as int64 wants an address divisible by 8; packed buffers start tensors anywhere."""
    return (data.clone() if data.storage_offset() % 8 or data.data_ptr() % 8 else data).view(torch.int64)


@cache
def _weights(device: torch.device) -> Tensor:
    """[COLUMNS] int64, odd, the same on every device."""
    x = torch.arange(1, COLUMNS + 1, dtype=torch.int64) * -7046029254386353131  # 2^64 / golden ratio
    x = (x ^ (x >> 30)) * -4658895280553007687  # as splitmix64 scatters
    x = (x ^ (x >> 27)) * -7723592293110705685
    return ((x ^ (x >> 31)) | 1).to(device)
