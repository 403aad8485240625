"""Plain files that start a run on many machines; they are printed, to be read, changed and kept.

slurm      a batch script: srun starts the ranks, exit status 75 (stopped, and saved) queues the job again
k8s        an indexed Job and a headless Service: torchrun on each pod meets at the first
hostfile   a shell script: one ssh a machine, torchrun on each (DeepSpeed's format: "host slots=4")
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import ConfigError
from .ranks import PORT

INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What is started where."""

    nodes: int = 1
    """Machines; a hostfile says so itself."""
    ranks: int = 1
    """Ranks on each machine: one for each GPU, or one for each few cores."""
    cpus: int | None = None
    """Cores of a rank (slurm, k8s)."""
    gpus: int = 0
    """GPUs of a machine (slurm, k8s)."""
    memory: str | None = None
    """Memory of a machine, such as "64G" (slurm) or "64Gi" (k8s)."""
    hours: float = 24.0
    """The longest that a Slurm job may run."""
    restarts: int = 3
    """How often torchrun starts a run again when a rank dies (k8s, hostfile)."""
    image: str = "twofold:latest"
    """The container image (k8s)."""
    name: str = "twofold"
    """What the job is called."""
    port: int = PORT
    """Where ranks meet on the first machine (k8s, hostfile)."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks", "port"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be 1 or more, not {getattr(self, name)}")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", self.name):
            raise ConfigError(f"--name must be lower-case letters, digits and dashes, not '{self.name}'")


def slurm(command: Sequence[str], config: LaunchConfig) -> str:
    """A batch script for `sbatch`."""
    asked = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": config.ranks,
        "cpus-per-task": config.cpus,
        "gpus-per-node": config.gpus or None,
        "mem": config.memory,
        "time": _clock(config.hours),
        "signal": "TERM@120",
        "output": f"{config.name}-%j.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            "# Each task finds its rank in the environment; two minutes before the end the run saves and ends with 75.",
            f"srun --kill-on-bad-exit=1 {shlex.join(command)}",
            "status=$?",
            'if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$status"',
            "",
        ]
    )


def kubernetes(command: Sequence[str], config: LaunchConfig) -> str:
    """A Service and a Job for `kubectl apply -f -`."""
    needs = {"cpu": config.cpus and config.cpus * config.ranks, "memory": config.memory, "nvidia.com/gpu": config.gpus}
    limits = [f'              {key}: "{value}"' for key, value in needs.items() if value]
    resources = ["          resources:", "            limits:", *limits] if limits else []
    first = f"{config.name}-0.{config.name}"
    arguments = [*_torchrun(config, config.nodes, "$(JOB_COMPLETION_INDEX)", first), *command]
    return "\n".join(
        [
            "apiVersion: v1",
            "kind: Service",
            f"metadata: {{name: {config.name}}}",
            f"spec: {{clusterIP: None, publishNotReadyAddresses: true, selector: {{job-name: {config.name}}}}}",
            "---",
            "apiVersion: batch/v1",
            "kind: Job",
            f"metadata: {{name: {config.name}}}",
            "spec:",
            f"  completions: {config.nodes}",
            f"  parallelism: {config.nodes}",
            "  completionMode: Indexed",
            f"  backoffLimit: {config.restarts * config.nodes}",
            "  template:",
            "    spec:",
            f"      subdomain: {config.name}",
            "      restartPolicy: OnFailure",
            "      terminationGracePeriodSeconds: 120",
            "      containers:",
            "        - name: train",
            f"          image: {config.image}",
            f"          command: [{', '.join(_quoted(word) for word in arguments)}]",
            "          env:",
            "            - name: JOB_COMPLETION_INDEX",
            "              valueFrom:",
            "                fieldRef:",
            f"                  fieldPath: metadata.annotations['{INDEX}']",
            *resources,
            "",
        ]
    )


def hostfile(command: Sequence[str], config: LaunchConfig, path: Path, directory: Path) -> str:
    """A shell script: one ssh a machine, all ended when one ends badly."""
    hosts = read_hostfile(path)
    slots = {count for _, count in hosts}
    if len(slots) > 1:
        raise ConfigError(f"{path}: torchrun wants as many ranks on each machine, not {sorted(slots)}")
    lines = []
    for number, (host, count) in enumerate(hosts):
        words = [*_torchrun(config, len(hosts), str(number), hosts[0][0], count), *command]
        remote = f"cd {shlex.quote(str(directory))} && {shlex.join(words)}"
        lines.append(f"ssh -tt {shlex.quote(host)} {shlex.quote(remote)} &")
    return "\n".join(
        [
            "#!/bin/bash",
            "trap 'kill $(jobs -p) 2>/dev/null' EXIT",
            *lines,
            f"for _ in $(seq {len(hosts)}); do wait -n || exit $?; done",
            "",
        ]
    )


def read_hostfile(path: Path) -> list[tuple[str, int]]:
    """Machines and their slots, "host slots=4" a line; "#" begins a comment.

    Raises:
        ConfigError: no such file, no machine in it, or a line that says something else; it is named.
    """
    if not path.is_file():
        raise ConfigError(f"no such hostfile: {path}")
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not (text := line.split("#", 1)[0].strip()):
            continue
        found = re.fullmatch(r"([\w.-]+)(?:\s+slots\s*=\s*([1-9]\d*))?", text)
        if found is None:
            raise ConfigError(f"{path}, line {number}: a line is 'host slots=4', not '{text}'")
        hosts.append((found[1], int(found[2] or 1)))
    if not hosts:
        raise ConfigError(f"{path} names no machine: write 'host slots=4' a line")
    return hosts


def _torchrun(config: LaunchConfig, nodes: int, node: str, first: str, ranks: int | None = None) -> list[str]:
    return [
        "torchrun",
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--nproc-per-node={ranks or config.ranks}",
        f"--master-addr={first}",
        f"--master-port={config.port}",
        f"--max-restarts={config.restarts}",
        "--no-python",
    ]


def _clock(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
