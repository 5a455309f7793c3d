#!/bin/sh
# Restores a stock Firecracker from a snapshot through pagecast, with curl only.
#
#   restore.sh SNAPSHOT.MEM SNAPSHOT.VMSTATE [auto|uffd|file]
#
# Runs until the guest has ended; its console is stdin and stdout. PAGECAST and FIRECRACKER name the programs, if they
# are not on PATH.
set -eu
mem=$(realpath "$1")
vmstate=$(realpath "$2")
backend=${3:-auto}

dir=$(mktemp -d)
daemon='' vm=''
clean_up() {
    # Firecracker first: it must not outlive its page server. Ended processes need no signal.
    for pid in $vm $daemon; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
    rm -rf "$dir"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# METHOD PATH [JSON]: a call of the control API, or of Firecracker's.
pagecast() { call "$dir/run/control.sock" "$@"; }
firecracker() { call "$dir/firecracker.sock" "$@"; }
call() {
    curl --silent --show-error --fail-with-body --unix-socket "$1" --request "$2" \
        --header 'Content-Type: application/json' ${4:+--data "$4"} --write-out '\n' "http://localhost$3"
}

# A daemon, and a Firecracker with nothing in it yet. exec 3: a shell gives /dev/null to what it starts with &.
exec 3<&0
"${PAGECAST:-pagecast}" serve --run-dir "$dir/run" >&2 &
daemon=$!
"${FIRECRACKER:-firecracker}" --api-sock "$dir/firecracker.sock" <&3 &
vm=$!
until pagecast GET /v1/health >&2 2>/dev/null; do kill -0 "$daemon" && sleep 0.1; done
until firecracker GET / >&2 2>/dev/null; do kill -0 "$vm" && sleep 0.1; done

# The snapshot becomes a template, the Firecracker a fork of it. The pid matters to `file` only.
pagecast PUT /v1/templates/snapshot "{\"mem_path\": \"$mem\", \"vmstate_path\": \"$vmstate\"}" >&2
fork=$(pagecast POST /v1/forks "{\"template\": \"snapshot\", \"id\": \"one\", \"backend\": \"$backend\", \"pid\": $vm}")
echo "$fork" >&2

# What pagecast answers as mem_backend is what Firecracker wants to hear.
mem_backend=$(echo "$fork" | sed 's/.*"mem_backend":\({[^}]*}\).*/\1/')
firecracker PUT /snapshot/load "{\"snapshot_path\": \"$vmstate\", \"mem_backend\": $mem_backend, \"resume_vm\": true}" >&2
pagecast GET /v1/forks/one >&2

wait "$vm"
vm=''
pagecast DELETE /v1/forks/one >&2
pagecast DELETE /v1/templates/snapshot >&2
