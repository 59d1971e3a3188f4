#!/usr/bin/env bash
# A Ray cluster on this machine: a head node and worker nodes, with token authentication.
#
#   cluster/local.sh up [WORKERS]   start it (default: 1 worker node; 0: the head does the work)
#   cluster/local.sh status         nodes and their resources; exit code 3 if it is not up
#   cluster/local.sh down           end it with all its processes
#
# Environment: PORT (job server and dashboard, 8265), GCS_PORT (6379), CLIENT_PORT (Ray Client,
# 10001), XDG_STATE_HOME (state: $XDG_STATE_HOME/arrowhead/cluster, else ~/.arrowhead/cluster).
#
# Network access: the job server and the dashboard listen on 127.0.0.1. In Ray 2.60 the GCS, raylet,
# object managers and Prometheus metrics listen on all interfaces, and the agents and Ray Client on
# this machine's address; --node-ip-address=127.0.0.1 does not change that (Ray replaces it with the
# real address). All of these except the metrics require the token. The token does not encrypt: on
# a network you do not trust, close the ports with a firewall.
set -euo pipefail

PORT=${PORT:-8265} GCS_PORT=${GCS_PORT:-6379} CLIENT_PORT=${CLIENT_PORT:-10001}
STATE=${XDG_STATE_HOME:+$XDG_STATE_HOME/arrowhead}
STATE=${STATE:-$HOME/.arrowhead}/cluster
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Jobs run `python`, which must be the one with Arrowhead.
[[ -x $ROOT/.venv/bin/ray ]] && PATH=$ROOT/.venv/bin:$PATH
# Ray and the processes that it starts must not import modules from the current folder.
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONSAFEPATH=1

refuse() {  # found, wanted, do
    printf 'local.sh: %s\n  wanted  %s\n  do      %s\n' "$@" >&2
    exit 2
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# The ids of all processes of this cluster. Most are in a session that this script opened. A job's
# driver opens its own session, but has this cluster's mark in its environment (other processes
# overwrite their environment with their titles).
members() {
    [[ -f $STATE/mark ]] || return 0
    {
        [[ ! -s $STATE/sessions ]] || ps -o pid= -s "$(paste -sd, "$STATE/sessions")" || true
        marked
    } | tr -d ' ' | sort -u
}

# One grep reads all files: one process per file would take seconds on a busy machine.
marked() {
    grep -lzxF "ARROWHEAD_CLUSTER=$(<"$STATE/mark")" /proc/[0-9]*/environ 2>/dev/null |
        tr -dc '0-9\n' || true
}

is_up() {
    [[ -s $STATE/sessions ]] && marked | grep -x "$(head -n 1 "$STATE/sessions")" >/dev/null
}

# Without this file `ray start` would run without authentication: anyone who reaches a port could run
# code here.
token() {
    [[ -n ${RAY_AUTH_TOKEN:-} ]] && return
    local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [[ ! -s $file ]]; then
        (umask 077 && mkdir -p "$(dirname "$file")" &&
            od -An -vtx1 -N32 /dev/urandom | tr -d ' \n' >"$file")
    fi
    chmod 600 "$file"
}

# Start a node and wait for it. Ray's own timeout is 30 s, so a busy machine may need another attempt.
node() {  # name, flags of `ray start`
    local name=$1 attempt pid
    shift
    for attempt in 1 2 3; do
        : >"$STATE/$name.log"  # it must exist before grep reads it
        # A small object store is enough for paths and small results. The system chooses the ports:
        # Ray's default ports may be used by another node on this machine.
        ARROWHEAD_CLUSTER=$(<"$STATE/mark") RAY_NUM_REDIS_GET_RETRIES=60 \
            setsid ray start --block --disable-usage-stats --object-store-memory=268435456 \
            --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 "$@" \
            >"$STATE/$name.log" 2>&1 </dev/null &
        pid=$!
        disown
        echo "$pid" >>"$STATE/sessions"
        while kill -0 "$pid" 2>/dev/null; do
            grep -qs "runtime started" "$STATE/$name.log" && return
            sleep 0.5
        done
        ps -o pid= -s "$pid" | xargs -r kill -KILL 2>/dev/null || true
        sed -i "/^$pid\$/d" "$STATE/sessions"
    done
    tail -n 20 "$STATE/$name.log" >&2
    down >/dev/null
    refuse "$name did not start (the end of its log is above)." "a Ray node that starts." \
        "fix the error in the log, then run it again."
}

up() {
    local workers=${1:-1} cpus gpus port name
    [[ $workers =~ ^[0-9]{1,3}$ ]] ||
        refuse "WORKERS is $workers." "a number of worker nodes, 0 or more." "run $0 up 1"
    if is_up; then
        echo "it is already up: http://127.0.0.1:$(<"$STATE/port")"
        return
    fi
    command -v ray >/dev/null ||
        refuse "there is no \`ray\` on the PATH." "Arrowhead's environment." \
            "run \`make setup\`, or put the environment's bin on the PATH."
    [[ -d $STATE ]] && down >/dev/null  # remains of a crash
    for name in PORT GCS_PORT CLIENT_PORT; do
        port=${!name}
        ! listens "$port" ||
            refuse "port $port is taken." "a free port for $name." \
                "find its process with \`ss -ltnp\`, or choose another port: $name=$((port + 1000)) $0 up"
    done
    token
    trap 'down; exit 130' INT TERM
    mkdir -p "$STATE"
    : >"$STATE/sessions"
    od -An -vtx1 -N8 /dev/urandom | tr -d ' \n' >"$STATE/mark"
    echo "$PORT" >"$STATE/port"
    echo "$GCS_PORT" >"$STATE/gcs"
    mktemp -d /tmp/arrowhead-XXXXXX >"$STATE/session"  # the paths of sockets must be short
    cpus=$(nproc)
    gpus=$(ls /dev 2>/dev/null | grep -cE '^nvidia[0-9]+$' || true)
    # With workers the head only runs the drivers of jobs, as on a real cluster.
    node head --head --port="$GCS_PORT" --dashboard-host=127.0.0.1 --dashboard-port="$PORT" \
        --ray-client-server-port="$CLIENT_PORT" --temp-dir="$(<"$STATE/session")" \
        --num-cpus=$((workers ? 0 : cpus)) --num-gpus=$((workers ? 0 : gpus))
    for ((name = 1; name <= workers; name++)); do
        # Nodes do not know that they share a machine: each would claim all GPUs, and in a shared
        # folder each would unpack a job's files again while its driver uses them.
        node "worker-$name" --address="127.0.0.1:$GCS_PORT" --temp-dir="$(<"$STATE/session")/$name" \
            --num-cpus=$((cpus > workers ? cpus / workers : 1)) \
            --num-gpus=$((name == 1 ? gpus : 0))
    done
    # The head knows a node only some time after the node reports that it has started.
    local until=$((SECONDS + 120))
    until knows $((workers + 1)); do
        if ((SECONDS > until)); then
            down >/dev/null
            refuse "$((workers + 1)) nodes were started, but fewer joined." "all of them." "run it again."
        fi
        sleep 0.5
    done
    trap - INT TERM
    local address=''
    [[ $PORT == 8265 ]] || address=" --address http://127.0.0.1:$PORT"
    echo "up: http://127.0.0.1:$PORT, a head and $workers workers, logs in $STATE"
    echo "next:"
    echo "  arrowhead submit$address -- fit PHOTOS OUT"
    echo "  arrowhead jobs list$address"
    echo "  $0 down"
}

# Whether the job server knows at least $1 nodes. The token is in no argument, because ps shows those.
knows() {
    python -P - "$1" "http://127.0.0.1:$(<"$STATE/port")/api/v0/nodes" 2>/dev/null <<'END'
import json, os, pathlib, sys, urllib.request

named = os.environ.get("RAY_AUTH_TOKEN_PATH") or pathlib.Path.home() / ".ray" / "auth_token"
token = os.environ.get("RAY_AUTH_TOKEN") or pathlib.Path(named).read_text().strip()
request = urllib.request.Request(sys.argv[2], headers={"Authorization": f"Bearer {token}"})
nodes = json.load(urllib.request.urlopen(request, timeout=10))["data"]["result"]["result"]
sys.exit(sum(node["state"] == "ALIVE" for node in nodes) < int(sys.argv[1]))
END
}

status() {
    if ! is_up; then
        echo "not up"
        exit 3
    fi
    echo "up: http://127.0.0.1:$(<"$STATE/port"), $(members | wc -l) processes, logs in $STATE"
    ray status --address "127.0.0.1:$(<"$STATE/gcs")" 2>/dev/null
}

signal() {
    local pid
    members | while read -r pid; do kill "-$1" "$pid" 2>/dev/null || true; done
}

down() {
    if [[ ! -d $STATE ]]; then
        echo "not up"
        return
    fi
    # Ray's own shutdown takes half a minute on a busy machine. There is no need to wait for it: the
    # results of finished jobs are on disk.
    signal TERM
    local until=$((SECONDS + 5))
    while [[ -n $(members) ]] && ((SECONDS < until)); do sleep 0.5; done
    while [[ -n $(members) ]]; do
        signal KILL
        sleep 0.2
    done
    [[ -f $STATE/session ]] && rm -rf "$(<"$STATE/session")"
    rm -rf "$STATE"
    echo "down"
}

case ${1:-} in
    up) up "${2:-1}" ;;
    status) status ;;
    down) down ;;
    *) refuse "'${1:-}' is no command." "up, status or down." "run $0 up" ;;
esac
