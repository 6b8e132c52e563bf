#!/usr/bin/env bash
# A Ray cluster on one machine that accepts jobs: start, submit, status, env, stop. It listens on loopback by default, every
# command needs its token, and it only ends processes that `start` started.
#
#   cluster/local.sh start [--num-cpus 4 …]                        more options go to `ray start`; --node-ip-address ADDRESS
#                                                                  opens all but the dashboard to other machines
#   cluster/local.sh submit -- python jobs/train.py camus --data /data/shards
#   cluster/local.sh status
#   eval "$(cluster/local.sh env)"                                 for `ray job …` and `jobs/pipeline.py --submit`
#   cluster/local.sh stop
#
# Environment variables, set before `start` and the same for the other verbs:
#   HEARTSEG_CLUSTER_DIR              token, process id, log (default: ~/.local/state/heartseg/cluster)
#   HEARTSEG_CLUSTER_PORT             6390    the cluster
#   HEARTSEG_CLUSTER_DASHBOARD_PORT   8290    the dashboard, which accepts jobs
#   HEARTSEG_CLUSTER_AGENT_PORT       52466   the dashboard's agent
#   HEARTSEG_CLUSTER_CLIENT_PORT      9001    the Ray client's server
#   HEARTSEG_CLUSTER_TIMEOUT_S        120     seconds that `start` waits for the dashboard, and `stop` for the processes to end
#   RAY                               the ray program (default: .venv/bin/ray, otherwise the one on PATH)
# Exit code: 2 for incorrect usage, 1 for any other failure; `submit` returns the job's: 0, or 1 if it failed.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dir=${HEARTSEG_CLUSTER_DIR:-${XDG_STATE_HOME:-${HOME:-/tmp}/.local/state}/heartseg/cluster}
case $dir in /*) ;; *) dir=$PWD/$dir ;; esac
port=${HEARTSEG_CLUSTER_PORT:-6390}
dashboard_port=${HEARTSEG_CLUSTER_DASHBOARD_PORT:-8290}
agent_port=${HEARTSEG_CLUSTER_AGENT_PORT:-52466}
client_port=${HEARTSEG_CLUSTER_CLIENT_PORT:-9001}
timeout_s=${HEARTSEG_CLUSTER_TIMEOUT_S:-120}
dashboard=http://127.0.0.1:$dashboard_port
# A Unix socket's path holds 107 bytes, and Ray uses up to 71 of them below its temporary directory.
longest_temp_dir=36

refuse() { # incorrect usage
    echo "cluster/local.sh: $1" >&2
    exit 2
}

fail() {
    echo "cluster/local.sh: $1" >&2
    exit 1
}

find_ray() {
    if [[ -z ${RAY:-} ]]; then
        RAY=ray
        if [[ -x $root/.venv/bin/ray ]]; then RAY=$root/.venv/bin/ray; fi
    fi
    RAY=$(command -v "$RAY") || refuse "no ray program found: install the project (see the README), or set RAY."
}

# The environment in which every Ray command reaches this cluster and no other.
set_environment() {
    unset RAY_AUTH_TOKEN RAY_ADDRESS # both would override what follows
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_API_SERVER_ADDRESS=$dashboard
}

# The id of the process that `start` left; fails if it has ended or another program has its id.
our_pid() {
    local pid temp_dir
    [[ -s $dir/pid && -s $dir/temp_dir ]] || return 1
    pid=$(<"$dir/pid") temp_dir=$(<"$dir/temp_dir")
    [[ $(ps -ww -p "$pid" -o args= 2>/dev/null) == *" start "*"--temp-dir $temp_dir "* ]] || return 1
    echo "$pid"
}

# True once a port answers a request for a path with our token. The token goes through a pipe, never into a command line.
answers() (
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET %s HTTP/1.0\r\nAuthorization: Bearer %s\r\n\r\n' "$2" "$(<"$dir/token")" >&3
    read -r -t 5 line <&3
    [[ $line == *" 200 "* ]]
) 2>/dev/null

remove_temp_dir() {
    local temp_dir
    [[ -s $dir/temp_dir ]] || return 0
    temp_dir=$(<"$dir/temp_dir")
    case $temp_dir in
        "$dir/ray/t" | /tmp/heartseg-ray.??????/t) rm -rf -- "${temp_dir%/t}" ;;
    esac
    rm -f "$dir/temp_dir"
}

# Ends the process and waits for it: without time to drain, Ray ends its children within seconds.
end() {
    local pid=$1 waited
    kill -TERM "$pid" 2>/dev/null || true
    for ((waited = 0; waited < 5 * timeout_s; waited++)); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.2
    done
    return 1
}

start() {
    local pid taken temp_dir detach waited callers_umask place
    if pid=$(our_pid); then
        echo "already running: process $pid, dashboard $dashboard"
        return
    fi
    find_ray
    for taken in "$port" "$dashboard_port" "$agent_port" "$client_port"; do
        if (exec 3<>"/dev/tcp/127.0.0.1/$taken") 2>/dev/null; then
            refuse "port $taken is in use: choose another (HEARTSEG_CLUSTER_…PORT, see cluster/local.sh --help)."
        fi
    done
    callers_umask=$(umask)
    umask 077
    mkdir -p "$dir" 2>/dev/null && [[ -w $dir ]] || refuse "cannot write to $dir: set HEARTSEG_CLUSTER_DIR."
    remove_temp_dir # of a cluster that died
    rm -f "$dir/pid"
    temp_dir=$dir/ray/t
    if ((${#temp_dir} <= longest_temp_dir)); then
        mkdir -p "$dir/ray"
    else
        temp_dir=$(mktemp -d /tmp/heartseg-ray.XXXXXX)/t
    fi # Ray makes its own directory readable by everyone, so a private one surrounds it
    echo "$temp_dir" >"$dir/temp_dir"
    : >"$dir/log"
    rm -f "$dir/token" # an earlier cluster's token is invalid
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$dir/token"
    umask "$callers_umask" # who may read what jobs write is the user's choice

    set_environment
    export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_USAGE_STATS_ENABLED=0
    export PATH=${RAY%/*}:$PATH # a job's `python` is the one that Ray runs with
    place=()
    if [[ " $* " != *" --node-ip-address"* ]]; then
        place=(--node-ip-address 127.0.0.1)
        export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # otherwise Ray replaces 127.0.0.1 with the machine's address
    fi
    detach="nohup"
    if command -v setsid >/dev/null; then detach=setsid; fi
    "$detach" "$RAY" start --head --block --temp-dir "$temp_dir" --port "$port" ${place[@]+"${place[@]}"} \
        --dashboard-host 127.0.0.1 --dashboard-port "$dashboard_port" --dashboard-agent-listen-port "$agent_port" \
        --ray-client-server-port "$client_port" --disable-usage-stats "$@" </dev/null >"$dir/log" 2>&1 &
    pid=$!
    echo "$pid" >"$dir/pid"
    trap 'end "$pid"; exit 130' INT TERM

    echo "starting Ray …"
    for ((waited = 0; waited < 2 * timeout_s; waited++)); do
        if ! kill -0 "$pid" 2>/dev/null; then
            tail -n 20 "$dir/log" >&2
            rm -f "$dir/pid"
            fail "Ray ended before it was ready: see above, and $dir/log."
        fi
        # The dashboard accepts jobs and passes them to the node's agent, which starts later.
        if answers "$dashboard_port" /api/version && answers "$agent_port" /api/healthz; then
            echo "running: process $pid, dashboard $dashboard, token in $dir/token, log in $dir/log"
            return
        fi
        sleep 0.5
    done
    tail -n 20 "$dir/log" >&2
    end "$pid" || true
    rm -f "$dir/pid"
    fail "Ray was not ready within $timeout_s s: see above, and $dir/log."
}

# A job's runtime_env: the caller's JSON, and the two folders that jobs read from the environment. Secrets are not passed: they
# belong in the environment of `start`.
runtime_env() {
    PATH=${RAY%/*}:$PATH python3 -c '
import json, os, sys
try:
    given = json.loads(sys.argv[1])
    folders = {name: os.environ[name] for name in ("HEARTSEG_DATA", "HEARTSEG_RUNS") if os.environ.get(name)}
    print(json.dumps(given | {"env_vars": folders | given.get("env_vars", {})}))
except (ValueError, TypeError, AttributeError):
    sys.exit(1)
' "$1"
}

# The dashboard shows a job's runtime_env to everyone who can open it.
warn_of_secrets() {
    local names
    names=$(grep -oiE '"?[A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?"?[[:space:]]*[:=]' <<<"$*" |
        grep -oE '[A-Za-z0-9_]+' | sort -u | paste -sd ' ') || return 0
    echo "cluster/local.sh: $names: all who open the dashboard see a runtime_env; set it before \`start\` instead." >&2
}

submit() {
    local options=() given='{}' environment
    while (($#)) && [[ $1 != -- ]]; do
        case $1 in
            --runtime-env | --runtime-env=*)
                refuse "--runtime-env is not supported: pass the file's content as --runtime-env-json."
                ;;
            --runtime-env-json)
                shift
                given=${1:-}
                ;;
            --runtime-env-json=*) given=${1#*=} ;;
            *) options+=("$1") ;;
        esac
        if (($#)); then shift; fi
    done
    (($# > 1)) || refuse "submit needs a command after --, such as: submit -- python jobs/train.py camus."
    find_ray
    environment=$(runtime_env "$given") || refuse "--runtime-env-json is not a JSON object."
    warn_of_secrets "$given"
    our_pid >/dev/null || refuse "no cluster is running: start it with cluster/local.sh start."
    set_environment
    exec "$RAY" job submit --working-dir "$root" --runtime-env-json "$environment" ${options[@]+"${options[@]}"} "$@"
}

status() {
    local pid words address
    pid=$(our_pid) || fail "not running."
    answers "$dashboard_port" /api/version || fail "process $pid runs, but $dashboard does not answer: see $dir/log."
    echo "running: process $pid, dashboard $dashboard, token in $dir/token, log in $dir/log"
    find_ray
    set_environment
    words=$(ps -ww -p "$pid" -o args=)
    address=${words##*--node-ip-address[= ]} # the last one counts
    # Without this variable, Ray asks at the machine's address instead of 127.0.0.1.
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "$RAY" status --address "${address%% *}:$port"
}

# The token itself is never printed.
env() {
    our_pid >/dev/null || refuse "no cluster is running: start it with cluster/local.sh start."
    echo "unset RAY_AUTH_TOKEN RAY_ADDRESS"
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=%q\n' "$dir/token" "$dashboard"
}

stop() {
    local pid
    if pid=$(our_pid); then
        end "$pid" || fail "process $pid has not ended within $timeout_s s of SIGTERM: see $dir/log, then run stop again."
        echo "stopped: process $pid"
    else
        echo "not running"
    fi
    remove_temp_dir
    rm -f "$dir/pid" "$dir/token"
}

verb=${1:-}
if (($#)); then shift; fi
case $verb in
    start | submit) "$verb" "$@" ;;
    status | env | stop)
        if (($#)); then refuse "$verb takes no arguments."; fi
        "$verb"
        ;;
    -h | --help | help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    *) refuse "'$verb' is not one of start, submit, status, env, stop (see --help)." ;;
esac
