#!/bin/sh
# Restores a Firecracker in the jail of its jailer from a snapshot through pagecast. Needs root.
#
#   restore.sh SNAPSHOT.MEM SNAPSHOT.VMSTATE UID GID [uffd|file]
#
# Firecracker runs as UID and GID, in a root directory and a PID namespace of its own. This script ends with the guest,
# whose console is stdin and stdout. PAGECAST, FIRECRACKER and JAILER name the programs, if they are not on PATH.
#
# With uffd, the host needs /dev/userfaultfd (Linux 6.1), which the jailer creates in the jail. With file, UID must be able
# to read the memory file, which keeps its owner and mode.
set -eu
mem=$(realpath "$1")
vmstate=$(realpath "$2")
uid=$3
gid=$4
backend=${5:-uffd}
firecracker=$(realpath "$(command -v "${FIRECRACKER:-firecracker}")")

dir=$(mktemp -d)
# The jailer's own layout: CHROOT_BASE_DIR/PROGRAM/ID/root.
jail=$dir/$(basename "$firecracker")/one/root
daemon='' vm=''
clean_up() {
    # Firecracker ends first, since it must not outlive its page server. It is no child of this shell: `wait` cannot be used.
    if [ -n "$vm" ]; then kill -KILL "$vm" 2>/dev/null || true; fi
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" || true
    fi
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# METHOD PATH [JSON]: calls the control API, or Firecracker's API.
pagecast() { call "$dir/run/control.sock" "$@"; }
api() { call "$jail/api.sock" "$@"; }
call() {
    curl --silent --show-error --fail-with-body --unix-socket "$1" --request "$2" \
        --header 'Content-Type: application/json' ${4:+--data "$4"} --write-out '\n' "http://localhost$3"
}

"${PAGECAST:-pagecast}" serve --run-dir "$dir/run" >&2 &
daemon=$!
until pagecast GET /v1/health >&2 2>/dev/null; do kill -0 "$daemon"; sleep 0.1; done
pagecast PUT /v1/templates/snapshot "{\"mem_path\": \"$mem\", \"vmstate_path\": \"$vmstate\"}" >&2

# The fork is created before the jailer starts: its memory file may be a mount, and the jailer copies mounts at its start.
mkdir -p "$jail"
install -o "$uid" -g "$gid" -m 0600 "$vmstate" "$jail/vmstate"
case $backend in
uffd) where="\"socket_path\": \"$jail/uffd.sock\", \"uid\": $uid, \"gid\": $gid" ;;
file) where="\"path\": \"$jail/mem\"" ;;
esac
fork=$(pagecast POST /v1/forks "{\"template\": \"snapshot\", \"id\": \"one\", \"backend\": \"$backend\", $where}")
echo "$fork" >&2

# With a PID namespace of its own, Firecracker is a child of the jailer, which writes its pid to a file and ends.
"${JAILER:-jailer}" --id one --exec-file "$firecracker" --uid "$uid" --gid "$gid" --chroot-base-dir "$dir" --new-pid-ns \
    -- --api-sock /api.sock --level Error
vm=$(cat "$jail/$(basename "$firecracker").pid")
until api GET / >&2 2>/dev/null; do kill -0 "$vm"; sleep 0.1; done

# The mem_backend in pagecast's answer is the one that Firecracker expects, with the path inside the jail.
mem_backend=$(echo "$fork" | sed "s/.*\"mem_backend\":\({[^}]*}\).*/\1/; s|$jail||")
api PUT /snapshot/load "{\"snapshot_path\": \"/vmstate\", \"mem_backend\": $mem_backend, \"resume_vm\": true}" >&2

pagecast GET /v1/forks/one >&2

# The daemon shows the end of Firecracker.
until pagecast GET /v1/forks/one | grep -q '"state":"exited"'; do kill -0 "$daemon"; sleep 0.2; done
vm=''
pagecast DELETE /v1/forks/one >&2
pagecast DELETE /v1/templates/snapshot >&2
