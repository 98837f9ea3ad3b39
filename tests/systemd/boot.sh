#!/bin/bash
# systemd as process 1 of namespaces of its own: nothing of the host's is touched. Usage: boot.sh FOLDER-WITH-UNIT
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/lock
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd,xattr cgroup /sys/fs/cgroup/systemd
cp "$1/holdfast.service" /run/systemd/system/
printf '[Unit]\nDescription=nothing\nDefaultDependencies=no\n' >/run/systemd/system/nothing.target
export container=holdfast-test
exec /lib/systemd/systemd --system --unit=nothing.target --log-target=console
