#!/bin/sh
# Restores a stock Firecracker from a snapshot through pagecast, with curl only.
#
#   restore.sh SNAPSHOT.MEM SNAPSHOT.VMSTATE [auto|uffd|file]
#
# Ends with the guest, whose console is stdin and stdout. PAGECAST and FIRECRACKER name the programs, if they are not on
# PATH.
set -eu
mem=$(realpath "$1")
vmstate=$(realpath "$2")
backend=${3:-auto}

dir=$(mktemp -d)
daemon='' vm=''
clean_up() {
    # Firecracker ends first, since it must not outlive its page server. Ended processes need no signal.
    for pid in $vm $daemon; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# METHOD PATH [JSON]: calls the control API, or Firecracker's API.
pagecast() { call "$dir/run/control.sock" "$@"; }
firecracker() { call "$dir/firecracker.sock" "$@"; }
call() {
    curl --silent --show-error --fail-with-body --unix-socket "$1" --request "$2" \
        --header 'Content-Type: application/json' ${4:+--data "$4"} --write-out '\n' "http://localhost$3"
}

# Starts a daemon, and a Firecracker without a microVM. Stdin is passed as fd 3: the shell replaces the stdin of background
# processes with /dev/null.
exec 3<&0
"${PAGECAST:-pagecast}" serve --run-dir "$dir/run" >&2 &
daemon=$!
"${FIRECRACKER:-firecracker}" --api-sock "$dir/firecracker.sock" <&3 &
vm=$!
until pagecast GET /v1/health >&2 2>/dev/null; do kill -0 "$daemon" && sleep 0.1; done
until firecracker GET / >&2 2>/dev/null; do kill -0 "$vm" && sleep 0.1; done

# Adds the snapshot as a template, and creates a fork for the Firecracker. Only the backend `file` uses the pid.
pagecast PUT /v1/templates/snapshot "{\"mem_path\": \"$mem\", \"vmstate_path\": \"$vmstate\"}" >&2
fork=$(pagecast POST /v1/forks "{\"template\": \"snapshot\", \"id\": \"one\", \"backend\": \"$backend\", \"pid\": $vm}")
echo "$fork" >&2

# The mem_backend in pagecast's answer is the one that Firecracker expects.
mem_backend=$(echo "$fork" | sed 's/.*"mem_backend":\({[^}]*}\).*/\1/')
firecracker PUT /snapshot/load "{\"snapshot_path\": \"$vmstate\", \"mem_backend\": $mem_backend, \"resume_vm\": true}" >&2
pagecast GET /v1/forks/one >&2

wait "$vm"
vm=''
pagecast DELETE /v1/forks/one >&2
pagecast DELETE /v1/templates/snapshot >&2
