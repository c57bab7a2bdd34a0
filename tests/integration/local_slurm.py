"""A real SLURM cluster on this machine, for as long as a test needs it: Debian's slurm-wlm and munge, run as root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
N_NODES = 3

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# A requeued job waits until the credentials of its steps have expired: by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
KillWait=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
"""


def why_not() -> str:
    """Why no cluster can be started here; "" when it can."""
    missing = [command for command in COMMANDS if _find(command) is None]
    if missing:
        return f"SLURM is not installed: no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "starting a SLURM cluster needs root"


@dataclass(frozen=True)
class LocalSlurm:
    """Nodes n1 and n2 in the default partition; n3, which claims to have two GPUs, in partition "gpu"."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, less any surrounding SLURM job's, for commands that address the cluster."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, ExitCode, ..."""
        return dict(item.split("=", 1) for item in self.run("scontrol", "show", "job", number).split() if "=" in item)


@contextmanager
def local_slurm(folder: Path) -> Iterator[LocalSlurm]:
    """Start the daemons, wait for the nodes, and end jobs and daemons afterwards."""
    cluster = LocalSlurm(folder)
    (folder / "state").mkdir()
    ports = _free_ports(1 + N_NODES)
    lines = [CONFIGURATION.format(folder=folder, port=ports[0])]
    for i, port in enumerate(ports[1:], start=1):
        gres = "Gres=gpu:2" if i == 3 else ""
        lines.append(f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1 {gres}\n")
    lines.append("PartitionName=debug Nodes=n[1-2] Default=YES\nPartitionName=gpu Nodes=n3\n")
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "gres.conf").write_text("NodeName=n3 Name=gpu File=/dev/null,/dev/zero\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    with ExitStack() as stack:
        names = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        files = [f"--{option}={folder / name}" for option, name in names.items()]
        start = [
            stack.enter_context(_daemon(cluster, "munged", "--foreground", "--force", f"--key-file={key}", *files))
        ]
        _wait(lambda: (folder / "munge.socket").exists(), start)
        start.append(stack.enter_context(_daemon(cluster, "slurmctld", "-D", "-c")))
        start += [stack.enter_context(_daemon(cluster, "slurmd", "-D", "-N", f"n{i + 1}")) for i in range(N_NODES)]
        idle = "--states=idle"
        _wait(lambda: len(cluster.run("sinfo", "--Node", "--noheader", idle).splitlines()) == N_NODES, start)
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root")
            _wait(lambda: not cluster.run("squeue", "--noheader"), start)


@contextmanager
def _daemon(cluster: LocalSlurm, command: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in the foreground, its log in the cluster's folder, ended with the context."""
    path = _find(command)
    assert path is not None, command
    with (cluster.folder / f"{command}.log").open("ab") as log:
        process = subprocess.Popen([path, *arguments], env=cluster.environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _find(command: str) -> str | None:
    """Daemons lie in sbin, which a user's PATH may lack."""
    return shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _free_ports(n_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n_ports)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _wait(condition: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [str(daemon.args) for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise RuntimeError(
                f"the SLURM cluster is not ready after {seconds} s; daemons that ended: {ended or 'none'}"
            )
        time.sleep(0.1)
