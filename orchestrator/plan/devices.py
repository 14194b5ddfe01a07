"""What a device can do at most, from its data sheet, and clusters written as "4x8xH200".

Figures are per device and dense (no sparsity). Memory is what the driver shows, a little less than the
sheet's decimal gigabytes. ``link`` is what one device sends to its neighbours in one direction: half of the
bidirectional figure that the sheets print.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.plugins import nearest

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or one CPU core."""

    name: str
    memory: int  # bytes; 0 for a core, whose memory is its node's
    flops: dict[str, float]  # dense, per second, by dtype
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another device of its node, one direction
    host_memory: int  # bytes of its node's memory per device, where the cluster does not say: typical servers
    source: str
    price: float = 0.04  # dollars an hour, rented: a guess; clouds differ by a factor of five

    @property
    def is_cpu(self) -> bool:
        return self.memory == 0


def _gpu(
    name: str, sheet: tuple[int, float, float, float, float], source: str, host_gib: int = 240
) -> Device:
    """``sheet``: MiB as nvidia-smi shows them, TB/s, TFLOP/s in bfloat16, TFLOP/s in float32, GB/s of
    link."""
    mib, tb_s, tflops, single, link_gb = sheet
    return Device(
        name=name,
        memory=mib * MIB,
        flops={"bfloat16": tflops * 1e12, "float32": single * 1e12},
        bandwidth=tb_s * 1e12,
        link=link_gb * 1e9,
        host_memory=host_gib * GIB,
        source=source,
        price=PRICES[name],
    )


PRICES = {
    "H200": 3.5, "H100": 2.5, "B200": 5.0, "A100": 1.6, "A100-40GB": 1.2, "L40S": 1.0, "A10": 0.8, "L4": 0.6,
}  # fmt: skip
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
DEVICES = {
    device.name: device
    for device in (
        _gpu("H200", (143771, 4.8, 989, 67, 450), NVIDIA + "h200/ (SXM)"),
        _gpu("H100", (81559, 3.35, 989, 67, 450), NVIDIA + "h100/ (SXM)"),
        _gpu("B200", (183359, 7.7, 2250, 75, 900), NVIDIA + "hgx/ (HGX B200, an eighth)"),
        _gpu("A100", (81920, 2.039, 312, 19.5, 300), NVIDIA + "a100/ (80 GB, SXM)"),
        _gpu("A100-40GB", (40960, 1.555, 312, 19.5, 300), NVIDIA + "a100/ (40 GB, SXM)", 120),
        _gpu("L40S", (46068, 0.864, 362, 91.6, 32), NVIDIA + "l40s/ (PCIe 4)", 120),
        _gpu("A10", (23028, 0.6, 125, 31.2, 32), NVIDIA + "products/a10-gpu/ (PCIe 4)", 60),
        _gpu("L4", (23034, 0.3, 121, 30.3, 32), NVIDIA + "l4/ (PCIe 4)", 60),
        # Measured on the machine of benchmarks/results: matrix products of one core, a copy on both.
        Device(
            name="cpu", memory=0, flops={"bfloat16": 85e9, "float32": 160e9}, bandwidth=10e9, link=5e9,
            host_memory=8 * GIB, source="benchmarks/results/README.md (2 cores with avx512_bf16, no AMX)",
        ),
    )
}  # fmt: skip

NETWORK = 50e9  # bytes/s per device between nodes, one direction: a 400 Gbit/s port each, as in HGX clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes of equal devices; on CPUs a device is a core."""

    nodes: int
    per_node: int
    device: Device
    host_memory: int  # bytes per node

    @property
    def num_devices(self) -> int:
        return self.nodes * self.per_node

    @property
    def text(self) -> str:
        return f"{self.nodes}x{self.per_node}x{self.device.name}"

    def links(self, num_devices: int) -> float:
        """Bytes/s that each of so many devices sends to the next: over the network once they span nodes."""
        return self.device.link if num_devices <= self.per_node else min(self.device.link, NETWORK)


def parse_cluster(text: str) -> Cluster:
    """ "4x8xH200": nodes, devices of each, their kind; "8xH200" is one node; "1x2xcpu@24" has 24 GiB a node.

    Raises ValueError for an unknown device and for counts below 1.
    """
    found = re.fullmatch(r"(?:(-?\d+)x)?(-?\d+)x([A-Za-z][\w-]*?)(?:@(\d+))?", text.strip())
    if found is None:
        raise ValueError(
            f"--cluster={text!r} is no cluster; expected NODESxDEVICESxKIND, e.g. 4x8xH200, 8xA100 or "
            "1x2xcpu@24 "
            "(@ memory of a node in GiB)"
        )
    nodes, per_node, kind, gib = found.groups()
    counts = (int(nodes or 1), int(per_node))
    if min(counts) < 1:
        raise ValueError(f"--cluster={text!r} counts {min(counts)} nodes or devices; give 1 or more of each")
    known = {name.lower(): device for name, device in DEVICES.items()}
    device = known.get(kind.lower())
    if device is None:
        raise ValueError(
            f"--cluster={text!r}: unknown device {kind!r}{nearest(kind, list(DEVICES))}; known: "
            f"{', '.join(DEVICES)}; take the nearest one, or add its data sheet to "
            "orchestrator/plan/devices.py"
        )
    host = int(gib) * GIB if gib else device.host_memory * counts[1]
    return Cluster(nodes=counts[0], per_node=counts[1], device=device, host_memory=host)
