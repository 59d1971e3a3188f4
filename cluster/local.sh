#!/usr/bin/env bash
# A Ray cluster on this machine: a head and workers, each a Ray node of its own, token on.
#
#   cluster/local.sh up [WORKERS]   start it (1 worker node; 0: the head does the work)
#   cluster/local.sh status         nodes and what they have; exit code 3 if it is not up
#   cluster/local.sh down           end it; no process of it is left
#
# Environment: PORT (job server and dashboard, 8265), GCS_PORT (6379), CLIENT_PORT (Ray Client,
# 10001), XDG_STATE_HOME (state: $XDG_STATE_HOME/arrowhead/cluster, else ~/.arrowhead/cluster).
#
# Who can reach it. Job server and dashboard listen on 127.0.0.1. Ray 2.60 itself listens on all
# interfaces with GCS, raylet, their object managers and the Prometheus metrics, and on this
# machine's address with its agents and Ray Client; --node-ip-address=127.0.0.1 does not change
# that (Ray puts the real address in its place). All of these but the metrics ask for the token.
# The token is not encryption: on a network you do not trust, close the ports with a firewall.
set -euo pipefail

PORT=${PORT:-8265} GCS_PORT=${GCS_PORT:-6379} CLIENT_PORT=${CLIENT_PORT:-10001}
STATE=${XDG_STATE_HOME:+$XDG_STATE_HOME/arrowhead}
STATE=${STATE:-$HOME/.arrowhead}/cluster
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Jobs run `python`: it must be the one that has Arrowhead.
[[ -x $ROOT/.venv/bin/ray ]] && PATH=$ROOT/.venv/bin:$PATH
# Nothing that lies in the folder we stand in is imported by Ray or by what it starts.
export PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONSAFEPATH=1

refuse() {  # found, wanted, do
    printf 'local.sh: %s\n  wanted  %s\n  do      %s\n' "$@" >&2
    exit 2
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Every process of this cluster. Most are in a session that we opened; a job's driver opens one of
# its own, but has our mark in its environment (which others overwrite with their titles).
members() {
    [[ -f $STATE/mark ]] || return 0
    {
        [[ ! -s $STATE/sessions ]] || ps -o pid= -s "$(paste -sd, "$STATE/sessions")" || true
        marked
    } | tr -d ' ' | sort -u
}

# grep alone reads them all: a process each would take seconds on a busy machine.
marked() {
    grep -lzxF "ARROWHEAD_CLUSTER=$(<"$STATE/mark")" /proc/[0-9]*/environ 2>/dev/null |
        tr -dc '0-9\n' || true
}

is_up() {
    [[ -s $STATE/sessions ]] && marked | grep -x "$(head -n 1 "$STATE/sessions")" >/dev/null
}

# Without this file `ray start` would run open: whoever reaches a port could run code here.
token() {
    [[ -n ${RAY_AUTH_TOKEN:-} ]] && return
    local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
    if [[ ! -s $file ]]; then
        (umask 077 && mkdir -p "$(dirname "$file")" &&
            od -An -vtx1 -N32 /dev/urandom | tr -d ' \n' >"$file")
    fi
    chmod 600 "$file"
}

# Start a node and wait for it; Ray gives itself 30 s, and a busy machine may need a second attempt.
node() {  # name, flags of `ray start`
    local name=$1 attempt pid
    shift
    for attempt in 1 2 3; do
        : >"$STATE/$name.log"  # there before it is looked into
        # Nothing of ours goes over Ray's object store but paths and small results. Ports of the
        # system's choice: Ray's usual ones may be taken by another node on this machine.
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
    refuse "$name did not come up (the end of its log is above)." "a Ray that starts." \
        "mend what the log says, then run it again."
}

up() {
    local workers=${1:-1} cpus gpus port name
    [[ $workers =~ ^[0-9]{1,3}$ ]] ||
        refuse "WORKERS is $workers." "a number of worker nodes, 0 or more." "run $0 up 1"
    if is_up; then
        echo "it is up already: http://127.0.0.1:$(<"$STATE/port")"
        return
    fi
    command -v ray >/dev/null ||
        refuse "there is no \`ray\` here." "Arrowhead's environment." \
            "run \`make setup\`, or put the environment's bin on the PATH."
    [[ -d $STATE ]] && down >/dev/null  # what a crash has left
    for name in PORT GCS_PORT CLIENT_PORT; do
        port=${!name}
        ! listens "$port" ||
            refuse "port $port is taken." "a free port for $name." \
                "see who has it with \`ss -ltnp\`, or choose another: $name=$((port + 1000)) $0 up"
    done
    token
    trap 'down; exit 130' INT TERM
    mkdir -p "$STATE"
    : >"$STATE/sessions"
    od -An -vtx1 -N8 /dev/urandom | tr -d ' \n' >"$STATE/mark"
    echo "$PORT" >"$STATE/port"
    echo "$GCS_PORT" >"$STATE/gcs"
    mktemp -d /tmp/arrowhead-XXXXXX >"$STATE/session"  # sockets in it need a short path
    cpus=$(nproc)
    gpus=$(ls /dev 2>/dev/null | grep -cE '^nvidia[0-9]+$' || true)
    # With workers the head does as on a real cluster: it runs the drivers of jobs, nothing else.
    node head --head --port="$GCS_PORT" --dashboard-host=127.0.0.1 --dashboard-port="$PORT" \
        --ray-client-server-port="$CLIENT_PORT" --temp-dir="$(<"$STATE/session")" \
        --num-cpus=$((workers ? 0 : cpus)) --num-gpus=$((workers ? 0 : gpus))
    for ((name = 1; name <= workers; name++)); do
        # Nodes do not know of each other: each would take all GPUs for its own, and in a folder that
        # they share unpack a job's files anew, under the feet of its driver.
        node "worker-$name" --address="127.0.0.1:$GCS_PORT" --temp-dir="$(<"$STATE/session")/$name" \
            --num-cpus=$((cpus > workers ? cpus / workers : 1)) \
            --num-gpus=$((name == 1 ? gpus : 0))
    done
    # A node is known a moment after it says that it has started.
    local until=$((SECONDS + 120))
    until knows $((workers + 1)); do
        if ((SECONDS > until)); then
            down >/dev/null
            refuse "$((workers + 1)) nodes were started, fewer joined." "all of them." "run it again."
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

# How many nodes the job server knows of, at least $1? The token is in no argument: ps shows those.
knows() {
    python -P - "$1" "http://127.0.0.1:$(<"$STATE/port")/api/v0/nodes" 2>/dev/null <<'END'
import json, os, pathlib, sys, urllib.request

named = os.environ.get("RAY_AUTH_TOKEN_PATH") or pathlib.Path.home() / ".ray" / "auth_token"
token = os.environ.get("RAY_AUTH_TOKEN") or pathlib.Path(named).read_text().strip()
ask = urllib.request.Request(sys.argv[2], headers={"Authorization": f"Bearer {token}"})
nodes = json.load(urllib.request.urlopen(ask, timeout=10))["data"]["result"]["result"]
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
    # Ray's own end takes half a minute on a busy machine, and there is nothing in it to wait for:
    # what jobs have finished is on the disk.
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
