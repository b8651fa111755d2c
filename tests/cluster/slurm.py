"""A small Slurm on this machine: its controller and two nodes, which are both this machine, from Debian's packages.

Nothing of it touches a Slurm or munge that the machine has otherwise: files, ports and the munge socket are its own.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.distributed.harness import ROOT, free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
ReturnToService=2
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
KillWait=60
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why it cannot be started here, or nothing."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(absent)} not found; launch/setup test installs them where it may call apt-get" if absent else ""


class Slurm:
    """The running cluster; ``stop`` it."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
        host = socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=[free_port() for _ in range(3)]))
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
        # The folder above may be open to others in ways that munged dislikes.
        self._call("munged", "--force", f"--key-file={key}", *(f"--{name}={folder / file}" for name, file in files.items()))
        self._call("slurmctld", "-f", folder / "slurm.conf")
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            self._call("slurmd", "-N", node, "-f", folder / "slurm.conf")
        self.wait_until(lambda: self._call("sinfo", "-h", "-o", "%T %D") == "idle 2", 60)

    def _call(self, *command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def logs(self) -> str:
        """The end of what the daemons wrote."""
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.folder.glob("*.log"))

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def submit(self, *arguments: str | Path) -> str:
        """Number of the job."""
        return self._call("sbatch", "--parsable", *arguments)

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETING``, …; nothing for a job that is over."""
        listed = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], env=self.environment, capture_output=True, text=True, check=False
        )
        return listed.stdout.strip()

    def control(self, *arguments: str) -> None:
        self._call("scontrol", *arguments)

    def signal(self, job: str, name: str) -> None:
        """To the tasks of the job."""
        self._call("scancel", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        self._call("scancel", job)

    def start_now(self, job: str) -> None:
        """Slurm lets a requeued job wait for two minutes.

        Not to wait at all would be too short: a node refuses a credential of the second in which the one before was revoked.
        """
        self.control("update", f"JobId={job}", "StartTime=now+3")

    def ends(self, job: str) -> list[str]:
        """How the job's runs ended, one after the other: ``COMPLETED``, ``PREEMPTED``, …"""
        lines = [line for line in (self.folder / "jobs.txt").read_text().splitlines() if line.startswith(f"JobId={job} ")]
        return [dict(part.split("=", 1) for part in line.split() if "=" in part)["JobState"] for line in lines]

    def stop(self) -> None:
        """End what still runs, then the daemons; munged last, since the others need it until their end."""
        self._call("scancel", f"--user={os.geteuid()}")
        self.wait_until(lambda: self._call("squeue", "-h") == "")
        for names in ("slurm*.pid", "munged.pid"):
            pids = [int(path.read_text()) for path in self.folder.glob(names)]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            self.wait_until(lambda pids=pids: not any(map(_runs, pids)), 60)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
