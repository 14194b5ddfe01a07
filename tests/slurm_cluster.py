"""A real Slurm of our own: munged, slurmctld and one slurmd per namespaced host, all below one folder."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests import hosts

CONF = """
ClusterName=quartet
SlurmctldHost={host}({gateway})
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/ctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/ctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
"""


def missing() -> str | None:
    tools = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
    return hosts.missing() or (f"{', '.join(tools)} not installed; run .ci/cluster-tools" if tools else None)


class Slurm:
    def __init__(self, base: Path, network: hosts.Network) -> None:
        self.base, self.network = base, network
        for name in ("munge", "state", *(f"spool-{host}" for host in network.names)):
            (base / name).mkdir()
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs=16 RealMemory=4000 Gres=gpu:2"
            for name, address in zip(network.names, network.addresses, strict=True)
        )
        self.conf = base / "slurm.conf"
        self.conf.write_text(
            CONF.format(host=socket.gethostname(), gateway=network.gateway, base=base, nodes=nodes,
                        names=",".join(network.names))
        )  # fmt: skip
        for k in range(2):
            (base / f"nvidia{k}").touch()
        gres = [f"NodeName={name} Name=gpu File={base}/nvidia[0-1]" for name in network.names]
        (base / "gres.conf").write_text("\n".join(["AutoDetect=off", *gres, ""]))
        (base / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._daemons = [self._munged(), self._daemon("slurmctld", "-D", "-c", "-f", str(self.conf))]
        for name in network.names:
            self.start_node(name)

    def _munged(self) -> subprocess.Popen:
        folder = self.base / "munge"
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o600)
        files = [f"--{what}-file={folder / what}" for what in ("key", "pid", "log", "seed")]
        process = self._daemon("munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
        until(lambda: (folder / "socket").exists(), 10)
        return process

    def _daemon(self, *command: str) -> subprocess.Popen:
        with (self.base / f"{command[0]}.out").open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def start_node(self, name: str) -> None:
        self.network.start(
            name, "slurmd", "-D", "-f", str(self.conf), "-N", name, log=self.base / f"{name}.out"
        )

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, check=False, timeout=60
        )
        return done.stdout + done.stderr

    def wait_for_nodes(self) -> None:
        idle = lambda: self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.network.names)  # noqa: E731
        until(idle, 60)

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(20)


def until(ready, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.3)
