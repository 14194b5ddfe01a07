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

import numpy as np
import torch
from torch import Tensor

COLUMNS = 1 << 14  # 128 KiB a row: the temporary stays in a core's cache
_ROWS = 256  # at once: 32 MiB, so few launches on a GPU


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
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return _by_numpy(data, start) if data.device.type == "cpu" else _by_torch(data, start)


def _by_numpy(data: Tensor, total: int) -> Tensor:
    """On CPUs: a third of PyTorch's time, a fifth for a small tensor."""
    words, weights = _words(data).numpy(), _weights(data.device).numpy()
    mixed = np.empty(min(len(words), COLUMNS), np.int64)
    for row, first in enumerate(range(0, len(words), COLUMNS)):
        x = words[first : first + COLUMNS]
        out = mixed[: len(x)]
        np.right_shift(x, 32, out=out)
        out += x
        total += (2 * row + 1) * int(np.dot(out, weights[: len(x)]))
    return torch.tensor((total + (1 << 63)) % (1 << 64) - (1 << 63))


def _by_torch(data: Tensor, start: int) -> Tensor:
    total = torch.full((), start, dtype=torch.int64, device=data.device)
    weights = _weights(data.device)
    for first_row, words in _rows(data):
        mixed = (words >> 32).add_(words).mul_(weights[: words.shape[1]])
        factors = torch.arange(first_row, first_row + len(words), device=data.device).mul_(2).add_(1)
        total += mixed.sum(1).mul_(factors).sum()
    return total


def _rows(data: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, [rows, COLUMNS] int64), the last one [1, less]."""
    row_bytes = COLUMNS * 8
    whole = data.numel() // row_bytes
    for row in range(0, whole, _ROWS):
        rows = data[row * row_bytes : min(row + _ROWS, whole) * row_bytes]
        yield row, _words(rows).view(-1, COLUMNS)
    tail = data[whole * row_bytes :]
    if tail.numel():
        yield whole, _words(tail).view(1, -1)


def _words(data: Tensor) -> Tensor:
    """As int64, padded with zero bytes to whole words. A view wants an address divisible by 8; packed buffers
    start tensors anywhere."""
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    elif data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    return data.view(torch.int64)


@cache
def _weights(device: torch.device) -> Tensor:
    """[COLUMNS] int64, odd, the same on every device."""
    x = torch.arange(1, COLUMNS + 1, dtype=torch.int64) * -7046029254386353131  # 2^64 / golden ratio
    x = (x ^ (x >> 30)) * -4658895280553007687  # as splitmix64 scatters
    x = (x ^ (x >> 27)) * -7723592293110705685
    return ((x ^ (x >> 31)) | 1).to(device)
