"""The files that start a run on many machines: they parse, and say what was asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from twofold.core import ConfigError
from twofold.parallel.launching import LaunchConfig, hostfile, kubernetes, read_hostfile, slurm

COMMAND = ["twofold", "train", "my recipe.toml", "--set", "optimizer.lr=3e-4"]


def parses(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_slurm() -> None:
    script = slurm(COMMAND, LaunchConfig(nodes=2, ranks=4, cpus=8, gpus=4, memory="64G", hours=1.5))
    parses(script)
    for line in ("--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-node=4", "--mem=64G"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --time=01:30:00\n" in script
    assert "srun --kill-on-bad-exit=1 twofold train 'my recipe.toml' --set optimizer.lr=3e-4\n" in script
    assert "--mem" not in slurm(COMMAND, LaunchConfig())


def test_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")  # comes with transformers
    config = LaunchConfig(nodes=3, ranks=2, cpus=4, memory="8Gi", gpus=2, image="me/it:1", name="night")
    service, job = yaml.safe_load_all(kubernetes(COMMAND, config))
    assert service["spec"]["clusterIP"] == "None" and job["spec"]["completions"] == 3
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][-5:] == COMMAND
    assert "--master-addr=night-0.night" in container["command"] and "--nproc-per-node=2" in container["command"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "8Gi", "nvidia.com/gpu": "2"}
    assert container["env"][0]["name"] == "JOB_COMPLETION_INDEX"


def test_hostfile(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nalpha slots=4\nbeta slots=4  # the new one\n\n")
    script = hostfile(COMMAND, LaunchConfig(), hosts, Path("/data/my runs"))
    parses(script)
    assert script.count("ssh -tt") == 2
    assert "--nnodes=2 --node-rank=1 --nproc-per-node=4 --master-addr=alpha" in script
    assert "/data/my runs" in script


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no machine"),
        ("alpha slots=four", "line 1: a line is 'host slots=4'"),
        ("alpha; rm slots=2", "line 1"),
    ],
)
def test_a_bad_hostfile_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_unlike_machines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=4")
    with pytest.raises(ConfigError, match="as many ranks on each machine"):
        hostfile(COMMAND, LaunchConfig(), tmp_path / "hosts", tmp_path)
    with pytest.raises(ConfigError, match="lower-case"):
        LaunchConfig(name="My Run")
