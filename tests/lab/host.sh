#!/bin/bash
# The first process of a host of the lab: its own root, /tmp, /dev, process table and sshd. Run by lab.py as
#   ip netns exec NETNS unshare -m -p -u -i -f --kill-child=KILL host.sh NAME FOLDER "READ-ONLY PATHS" STORAGE
# FOLDER/disk is what survives a reboot.
set -e
name=$1 folder=$2 visible=$3 storage=$4
mount --make-rprivate /
mkdir -p "$folder/disk/upper" "$folder/disk/work" "$folder/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/disk/upper,workdir=$folder/disk/work" "$folder/root"
r=$folder/root
mount -t proc proc "$r/proc"
mount -t sysfs sysfs "$r/sys"
mount -t tmpfs -o mode=755 tmpfs "$r/dev"
for d in null zero full random urandom tty; do : > "$r/dev/$d"; mount --bind "/dev/$d" "$r/dev/$d"; done
mkdir -p "$r/dev/pts" "$r/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$r/dev/pts"
ln -s pts/ptmx "$r/dev/ptmx"
ln -s /proc/self/fd "$r/dev/fd"
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%%:*}" "$r/dev/${n##*:}"; done
mount -t tmpfs -o mode=1777,size=4g tmpfs "$r/dev/shm"
mount -t tmpfs -o mode=1777,size=4g tmpfs "$r/tmp"
mount -t tmpfs -o mode=755 tmpfs "$r/run"
mkdir -p "$r/run/sshd"
hostname "$name"
cp "$folder/../hosts" "$r/etc/hosts"
cp "$folder/../sshd_config" "$r/etc/ssh/sshd_config"
mkdir -p -m 700 "$folder/disk/home/.ssh"
mount --bind "$folder/disk/home" "$r/root"
for path in $visible; do
  if [ -d "$path" ]; then mkdir -p "$r$path"; mount --bind -o ro "$path" "$r$path"; fi
done
if [ -n "$storage" ]; then mkdir -p "$r/storage"; mount --bind "$storage" "$r/storage"; fi
# an authorized key comes with the machine, as a site's administrator installs it; what is added later is lost
# when the disk is wiped
[ -e "$r/root/.ssh/authorized_keys" ] || cp "$folder/../authorized_keys" "$r/root/.ssh/authorized_keys"
[ -e "$r/root/.profile" ] || echo '[ -f ~/.bashrc ] && . ~/.bashrc' > "$r/root/.profile"
cp "$folder"/host_key "$r/etc/ssh/host_key"
chmod 600 "$r/etc/ssh/host_key" "$r/root/.ssh/"*
chown -R 0:0 "$r/root/.ssh"
mkdir -p "$r/mnt/old"
cd "$r"
pivot_root . mnt/old
umount -l /mnt/old
cd /
exec env -i PATH="$LAB_PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" HOME=/root LANG=C.UTF-8 \
  TERM=xterm tini -s -- /usr/sbin/sshd -D -e
