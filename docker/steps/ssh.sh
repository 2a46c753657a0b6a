#!/bin/bash
# Lets hosts of a job reach each other as root, by one key that is in the image: only containers of this image know it, and
# whoever has the image. On a shared network make the key at start instead, as Kubernetes' MPIJob does.
set -euo pipefail
mkdir -p /run/sshd /root/.ssh
chmod 700 /root/.ssh
[ -e /root/.ssh/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
chmod 600 /root/.ssh/authorized_keys
ssh-keygen -A
mkdir -p /etc/ssh/ssh_config.d /etc/ssh/sshd_config.d
# Kubernetes' MPIJob mounts its keys over /root/.ssh: the client's options stay outside of it, and sshd must not ask who may write
# there (StrictModes).
cat >/etc/ssh/ssh_config.d/train.conf <<'CONFIG'
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
CONFIG
cat >/etc/ssh/sshd_config.d/train.conf <<'CONFIG'
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
# The environment of SageMaker's hosts is told to ranks by /etc/environment.
PermitUserEnvironment no
CONFIG
sshd -t || /usr/sbin/sshd -t
