# Sourced by up and down: where everything is, and how a server is started and ended.
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
: "${CRYPTATTACH_OS_STATE:?the directory for all that the servers write}"
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/cryptattach/openstack
VENV=$CACHE/venv-$(sha256sum "$HERE/requirements.txt" | cut -c1-12)
S=$CRYPTATTACH_OS_STATE
RUN=$S/run
LOG=$S/log
B=$VENV/bin
# Swift's devices need extended attributes: tmpfs has them since Linux 6.6, ext4 4 KiB for a file. In memory where that works.
DEVICES=/dev/shm/cryptattach-os-$(printf %s "$S" | sha256sum | cut -c1-12)

# Two runs on one machine have ports of their own. Below 32768: a client polling a port of the ephemeral range can connect to
# itself and take the server's port. Who chooses has the lock until the servers listen, for others see only then that the ports
# are taken.
free_ports() {
    local base port
    for base in $(seq 15000 1000 31000); do
        for port in 0 11 80 81 100 101; do
            (exec 3<>"/dev/tcp/127.0.0.1/$((base + port))") 2>/dev/null && continue 2
        done
        echo "$base"
        return
    done
    echo "no free ports from 15000 to 32000" >&2
    return 1
}
BASE=$(cat "$S/ports" 2>/dev/null) || {
    mkdir -p "$CACHE"
    exec 7>"$CACHE/.ports"
    flock 7
    BASE=$(free_ports)
}
KEYSTONE=$BASE BARBICAN=$((BASE + 11)) PROXY=$((BASE + 80)) TEMPAUTH=$((BASE + 81))
CONTAINER=$((BASE + 201)) ACCOUNT=$((BASE + 202)) OBJECT=$((BASE + 210))
TLS=$((BASE + 100)) WRONG_TLS=$((BASE + 101))
SERVERS="keystone account container object1 object2 object3 proxy tempauth barbican tls wrong-tls"

started_at() { # of a process, in clock ticks: with its pid it names the process for ever (proc_pid_stat(5), field 22)
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    # shellcheck disable=SC2086 # a list of words
    set -- $stat
    echo "${20}"
}
alive() {
    local pid ticks
    read -r pid ticks 2>/dev/null <"$RUN/$1.pid" || return 1
    [ "$(started_at "$pid")" = "$ticks" ]
}
start_one() { # NAME COMMAND...: in a session of its own, which is ended as a whole
    local name=$1
    shift
    alive "$name" && return 0
    setsid "$@" >>"$LOG/$name.log" 2>&1 </dev/null 7>&- &
    echo "$! $(started_at $!)" >"$RUN/$name.pid"
}
stop_one() {
    local pid rest signal
    alive "$1" || return 0
    read -r pid rest <"$RUN/$1.pid"
    # A server that was stopped (SIGSTOP) must go on to hear that it is to end.
    kill -CONT -- "-$pid" 2>/dev/null
    for signal in TERM KILL; do
        kill "-$signal" -- "-$pid" 2>/dev/null
        for _ in $(seq 50); do alive "$1" || break 2; sleep 0.1; done
    done
    rm -f "$RUN/$1.pid"
}
answers() { # NAME URL
    for _ in $(seq 1200); do
        if curl -sk -o /dev/null --max-time 2 "$2"; then return 0; fi
        alive "$1" || break
        sleep 0.1
    done
    echo "$1 does not answer at $2:" >&2
    tail -20 "$LOG/$1.log" >&2
    return 1
}
