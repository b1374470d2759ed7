#!/bin/sh
# Two QEMU guests share a directory with --cache shared, each by a vfs-backend of its own, in one domain.
#
#   make lab && examples/two-guests.sh DIRECTORY      DIRECTORY is what they share
#
# A console of each guest is a Unix socket in a folder that the script names. Ctrl-C ends everything.
# KERNEL (with virtio-fs built in), BUSYBOX (static), ACCEL (tcg, kvm) and BIN (where the commands are) may be set.
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
share=${1:?usage: two-guests.sh DIRECTORY}
KERNEL=${KERNEL:-$(echo "$top"/.lab/trees/cloud-kernel/boot/vmlinuz-*)}
BUSYBOX=${BUSYBOX:-$top/.lab/trees/cloud-kernel/usr/bin/busybox}
ACCEL=${ACCEL:-tcg}
BIN=${BIN:-$top/.venv/bin}
run=$(mktemp -d)
table=vt-two-guests-$$
pids=
# The newest first: machines, backends, coherenced.
trap 'for pid in $pids; do kill $pid && wait $pid; done; rm -rf "$run" "/dev/shm/$table" "/dev/shm/$table".l*' EXIT
trap 'exit 0' INT TERM

until_there() { for _ in $(seq 100); do [ -S "$1" ] && return; sleep 0.1; done; echo "$1 does not appear" >&2; exit 1; }

# The guests' root: busybox, and an init that mounts the share and is a shell.
mkdir -p "$run/root/bin" "$run/root/proc" "$run/root/dev" "$run/root/mnt"
cp "$BUSYBOX" "$run/root/bin/busybox"
cat > "$run/root/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t virtiofs data /mnt && echo "the share is at /mnt"
exec setsid cttyhack sh
INIT
chmod +x "$run/root/init"
(cd "$run/root" && find . | "$BUSYBOX" cpio -o -H newc > "$run/initrd" 2>/dev/null)

"$BIN/coherenced" --table "/$table" --socket "$run/coherenced.sock" &
pids=$!
until_there "$run/coherenced.sock"
for guest in guest1 guest2; do
    "$BIN/vfs-backend" --shared-dir "$share" --socket-path "$run/$guest.sock" --cache shared --guest $guest \
        --coherence "/dev/shm/$table" --coherence-socket "$run/coherenced.sock" &
    pids="$! $pids"
    until_there "$run/$guest.sock"
    qemu-system-x86_64 -accel "$ACCEL" -nodefaults -display none -m 256M -kernel "$KERNEL" -initrd "$run/initrd" \
        -append "console=ttyS0 quiet panic=-1" -no-reboot \
        -object memory-backend-memfd,id=mem,size=256M,share=on -numa node,memdev=mem \
        -chardev "socket,id=data,path=$run/$guest.sock" -device vhost-user-fs-pci,chardev=data,tag=data \
        -serial "unix:$run/$guest.console,server=on,wait=off" &
    pids="$! $pids"
done
echo "consoles: socat -,rawer unix-connect:$run/guest1.console    (and guest2.console)"
echo "status:   $BIN/coherencectl status --socket $run/coherenced.sock"
wait
