"""Hosts on one machine: network namespaces, each with its own address, hostname, /dev/shm and /tmp/ray.

Names are looked up in a file of their own: no name server answers here, and each question would wait for one.

    switch 10.88.N.254 (this machine) -- host 1: 10.88.N.1 -- host 2: 10.88.N.2 -- ...

Needs root and iproute2. Whoever makes a ``Network`` closes it: that kills what runs in it and
removes the bridge.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

INSIDE = """
hostname "$0"
mount --make-rprivate /
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray
mount --bind "$1" /tmp/ray
mount --bind "$2" /etc/hosts
mount --bind /dev/null /etc/resolv.conf
shift 2
exec "$@"
"""


def missing() -> str | None:
    """Why namespaced hosts cannot be made here."""
    if os.geteuid() != 0:
        return "namespaced hosts need root"
    tools = [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]
    return f"{', '.join(tools)} not installed; run .ci/cluster-tools" if tools else None


class Network:
    def __init__(self, folder: Path, count: int) -> None:
        self.number = os.getpid() % 200 + 20
        self.folder, self.bridge = folder, f"qbr{self.number}"
        self.names = [f"q{self.number}h{k}" for k in range(1, count + 1)]
        self.gateway = f"10.88.{self.number}.254"
        self.addresses = [f"10.88.{self.number}.{k}" for k in range(1, count + 1)]
        self._started: list[subprocess.Popen] = []
        ip(f"link add {self.bridge} type bridge")
        ip(f"addr add {self.gateway}/24 dev {self.bridge}")
        ip(f"link set {self.bridge} up")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {self.bridge} up")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} addr add {address}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} route add default via {self.gateway}")
            (folder / name).mkdir()
        named = {"127.0.0.1": "localhost", **dict(zip(self.addresses, self.names, strict=True))}
        named[self.gateway] = socket.gethostname()
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in named.items()))

    def start(self, name: str, *command: str, log: Path) -> subprocess.Popen:
        """A command on a host."""
        inside = ["nsenter", f"--net=/run/netns/{name}", "unshare", "-m", "-u"]
        mounts = [str(self.folder / name), str(self.folder / "hosts")]
        process = subprocess.Popen(
            [*inside, "bash", "-c", INSIDE, name, *mounts, *command],
            stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def processes(self, name: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, name: str) -> None:
        """The host loses power."""
        while pids := self.processes(name):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)

    def close(self) -> None:
        for name in self.names:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", name], check=False)
            subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
        for process in self._started:
            process.wait()
        subprocess.run(["ip", "link", "del", self.bridge], check=False)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
