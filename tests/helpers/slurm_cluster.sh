#!/usr/bin/env bash
# Starts a real Slurm cluster on this machine for the tests: a controller and pretended nodes.
#
#   slurm_cluster.sh up               start it and print what `env` prints; up twice is fine
#   slurm_cluster.sh env              shell lines that set SLURM_CONF and PATH: eval "$(... env)"
#   slurm_cluster.sh node-down NODE   cut the power of a node
#   slurm_cluster.sh node-up NODE     and switch it on again
#   slurm_cluster.sh down             kill jobs and daemons, remove the folder; twice is fine
#
# Needs root, and Slurm or apt-get: where Slurm is not installed, Debian's packages are unpacked
# into the user's cache. Nothing gets installed. Settings from the environment, all optional:
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}
LAB=${SLURM_LAB:-$cache/l2p-slurm}  # the folder of the cluster
NODES=${SLURM_LAB_NODES:-2}         # up to 40
CPUS=${SLURM_LAB_CPUS:-64}          # what each node claims to have
MEMORY=${SLURM_LAB_MEMORY:-1000000} # likewise, in MB
GPUS=${SLURM_LAB_GPUS:-8}           # likewise: copies of /dev/null; 0 for none
OWNER=${SLURM_LAB_OWNER:-}          # a process id: the cluster goes down after that process
# ns: each node has its own host name, address, processes and /dev/shm, by Linux namespaces.
# host: the nodes are daemons that share all that. auto: ns where it works.
MODE=${SLURM_LAB_MODE:-auto}

set -u
umask 022
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
CONF=$LAB/etc/slurm.conf
PACKAGES=$cache/l2p-slurm-packages
SELF=$(readlink -f "${BASH_SOURCE[0]}")

die() { echo "slurm_cluster: $*" >&2; exit 1; }
fail() { tail -n 8 "$LAB/log/$2" >&2; stop; die "$1; the logs are in $LAB/log"; } # MESSAGE LOG
within() { # SECONDS COMMAND: waits until the command succeeds
    local end=$((SECONDS + $1))
    until "${@:2}"; do [ $SECONDS -lt $end ] && sleep 0.1 || return 1; done
}

check() {
    [ "$(id -u)" = 0 ] || die "must be root"
    [[ $LAB =~ ^/[A-Za-z0-9._/-]{1,79}$ ]] || die "SLURM_LAB=$LAB: give a short absolute path"
    [ -e "$LAB/.slurm-lab" ] || [ -z "$(ls -A "$LAB" 2>/dev/null)" ] ||
        die "SLURM_LAB=$LAB: has other files, give a new or an empty folder"
}

fetch_packages() { # copies of Debian's programs that find their libraries in $PACKAGES
    local new=$PACKAGES.new lib words
    rm -rf "$new" "$PACKAGES"
    mkdir -p "$new/debs/partial" || die "cannot write $new"
    words=(timeout 300 apt-get -qq -y --download-only --reinstall --no-install-recommends
        -o "Dir::Cache::archives=$new/debs" install munge slurm-client slurmctld slurmd patchelf)
    { "${words[@]}" || { timeout 300 apt-get -qq update && "${words[@]}"; }; } &>"$new/log" ||
        die "there is no Slurm, and its packages cannot be had: $(tail -n 5 "$new/log")"
    for deb in "$new"/debs/*.deb; do dpkg-deb -x "$deb" "$new" || die "cannot unpack $deb"; done
    for program in "$new"/usr/sbin/*-wlm; do ln -s "${program##*/}" "${program%-wlm}"; done
    lib=$(cd "$new" && echo usr/lib/*/slurm-wlm)
    grep -rl --exclude=patchelf '^.ELF' "$new/usr" | xargs "$new/usr/bin/patchelf" --force-rpath \
        --set-rpath "$PACKAGES/$lib:$PACKAGES/${lib%/*}" || die "cannot patch the programs"
    rm -r "$new/debs" && mv "$new" "$PACKAGES"
}
find_programs() { # installed ones or these copies
    PLUGINS='' STEPD='' BIN=$LAB/bin
    ! type munged slurmctld slurmd srun &>/dev/null || return 0
    "$PACKAGES/usr/sbin/slurmd" -V &>/dev/null || fetch_packages
    PLUGINS=$(echo "$PACKAGES"/usr/lib/*/slurm-wlm) STEPD=$PACKAGES/usr/sbin/slurmstepd
    BIN=$LAB/bin:$PACKAGES/usr/bin PATH=$PACKAGES/usr/bin:$PACKAGES/usr/sbin:$PATH
}

pick_place() { # names, ports, addresses and a bridge that no other cluster of this machine uses
    local i
    if [ "$MODE" = auto ]; then
        MODE=host
        unshare --pid --fork --kill-child --mount-proc --uts --net -m sh -c '
            echo x >/proc/sys/kernel/hostname && mount -t tmpfs x /mnt &&
            ip link add x type bridge && ip link add y type veth' &>/dev/null && MODE=ns
    fi
    for ((i = $(cksum <<<"$LAB" | cut -d' ' -f1); ; i++)); do
        PORT=$((10000 + 100 * (i % 200))) NET=10.213.$((i % 200)) BRIDGE=l2p$((i % 200))
        (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null || [ -e "/sys/class/net/$BRIDGE" ] || break
    done
    NAMES=$(seq -f n%g "$NODES")
    # Here a node's name is its address, so that lists of nodes need no name resolution.
    [ "$MODE" = ns ] || NET=127.0.0 NAMES=$(seq -f 127.0.0.%g 11 $((10 + NODES)))
}

write_conf() {
    local host gpus=()
    host=$(uname -n) host=${host%%.*}
    for ((i = 0; i < GPUS; i++)); do # Slurm insists on device files
        mknod "$LAB/dev/gpu$i" c 1 3 2>/dev/null && gpus+=("$LAB/dev/gpu$i")
    done
    [ ${#gpus[@]} = "$GPUS" ] || gpus=(/dev/{null,zero,full,random,urandom,tty}) # no right to mknod
    gpus=("${gpus[@]:0:GPUS}")
    (IFS=,; echo "${gpus:+Name=gpu File=${gpus[*]}}") >"$LAB/etc/gres.conf"
    # cred_expire: a requeued job waits this long, 120 s by default. FirstJobId: numbers of jobs of
    # an earlier cluster must not come again. MinJobAge: ended jobs stay known, for `sacct`.
    cat >"$CONF" <<END
ClusterName=l2p
SlurmctldHost=$host($NET.254)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$LAB/run/munge.sock,cred_expire=5
${PLUGINS:+PluginDir=$PLUGINS}
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd-%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/%n/slurmd.log
FirstJobId=$(($(date +%s) % 60000000 + 1000))
MinJobAge=86400
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=5
GresTypes=gpu
PartitionName=DEFAULT Nodes=ALL GraceTime=20 DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=main PriorityTier=10 Default=YES
PartitionName=low PriorityTier=1
PartitionName=high PriorityTier=100 PreemptMode=OFF
NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEMORY ${gpus:+Gres=gpu:${#gpus[@]}}
END
    printf '127.0.0.1 localhost\n%s %s\n' "$NET.254" "$host" >"$LAB/etc/hosts"
    for name in $NAMES; do
        [ "$MODE" = host ] || host=$name
        i=${name##*[n.]}
        echo "NodeName=$name NodeHostname=$host NodeAddr=$NET.$i Port=$((PORT + i))" >>"$CONF"
        echo "$NET.$i $name" >>"$LAB/etc/hosts"
    done
    # The nodes reach no name server; without these files each look-up would wait for one.
    : >"$LAB/etc/resolv.conf"
    echo "hosts: files" >"$LAB/etc/nsswitch.conf"
    # The real sacct needs a database. This one answers from the controller's memory.
    cat >"$LAB/bin/sacct" <<'END'
#!/usr/bin/env bash
# Stands in for: sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...]
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do [ "$1" = -j ] && scontrol -o show job "$2"; shift; done 2>/dev/null |
    sed -E 's/^JobId=([^ ]*).* JobState=([^ ]*).* NodeList=([^ ]*).*/\1|\2|\3/'
END
    chmod 755 "$LAB/bin/sacct"
}

# Slurm gives jobs' processes SLURM_CONF and SLURMD_NODENAME; here the daemons have them, too.
members() { # [NODE]: the process ids of one node, or of the cluster and its clients
    local ours
    ours=$(grep -lszxF "SLURM_CONF=$CONF" /proc/[0-9]*/environ)
    {
        xargs -r grep -lszx "SLURMD_NODENAME=${1:-.*}" <<<"$ours"
        if [ $# = 0 ]; then
            xargs -r grep -lsz '^SLURM_JOB_ID=' <<<"$ours" # commands of salloc
            xargs -r grep -lsxE 'srun|sbatch|salloc' <<<"${ours//environ/comm}"
        fi
        # slurmstepd overwrites its environment, but stays in the folder of the node's log
        grep -lsx slurmstepd /proc/[0-9]*/comm | sed 's/comm$/cwd/' |
            xargs -rI{} find {} -printf '%p/%l/\n' | grep -F "/cwd/$LAB/log/${1:+$1/}"
    } 2>/dev/null | cut -d/ -f3
}
none_left() { # [NODE]: kills them
    mapfile -t pids < <(members "$@")
    [ ${#pids[@]} = 0 ] || { kill -KILL "${pids[@]}" 2>/dev/null; false; }
}

start_controller() {
    local -x SLURM_CONF=$CONF SLURMD_NODENAME=controller
    if [ "$MODE" = ns ]; then
        ip link add "$BRIDGE" type bridge && ip link set "$BRIDGE" alias "$LAB" up &&
            ip addr add "$NET.254/24" dev "$BRIDGE" || return
    fi
    (umask 077 && head -c 128 /dev/urandom >"$LAB/etc/munge.key")
    # --force: munged wants a folder that all users can enter; a temporary folder may be closed.
    munged --force --key-file="$LAB/etc/munge.key" --socket="$LAB/run/munge.sock" --num-threads=4 \
        --pid-file="$LAB/run/munged.pid" --seed-file="$LAB/run/seed" --log-file="$LAB/log/munged" &&
        slurmctld -c
} &>"$LAB/log/controller" </dev/null
node_up() { # NAME
    local -x SLURM_CONF=$CONF SLURMD_NODENAME=$1
    local outer init i=${1##*[n.]}
    mkdir -p "$LAB/log/$1"
    if [ "$MODE" = host ]; then slurmd -N "$1" -c ${STEPD:+-d "$STEPD"}; return; fi
    setsid unshare --pid --fork --kill-child --mount-proc --uts --net -m \
        "$BASH" "$SELF" _node "$1" &
    outer=$! && disown
    within 10 [ -e "$LAB/run/waits-$1" ] || return 1
    init=$(<"/proc/$outer/task/$outer/children") init=${init% }
    ip link add "$BRIDGE.$i" type veth peer name eth0 netns "$init" &&
        ip link set "$BRIDGE.$i" master "$BRIDGE" alias "$LAB" up &&
        nsenter -t "$init" -n ip addr add "$NET.$i/24" dev eth0 &&
        nsenter -t "$init" -n ip link set eth0 up && echo "$init" >"$LAB/run/init-$1"
} &>"$LAB/log/$1.start" </dev/null
run_node() { # NAME: the first process of a node in its namespaces
    echo "$1" >/proc/sys/kernel/hostname
    for file in /etc/{hosts,resolv.conf,nsswitch.conf}; do
        [ ! -e "$file" ] || mount --bind "$LAB$file" "$file" || exit 1
    done
    mount -t tmpfs -o mode=1777 "$1" /dev/shm
    ip link set lo up
    : >"$LAB/run/waits-$1"
    within 10 [ -e "$LAB/run/init-$1" ] && slurmd -D -N "$1" -c ${STEPD:+-d "$STEPD"}
}
node_down() { # NAME: the cable first, so that nobody hears the connections close
    [ "$MODE" = host ] || ip link del "$BRIDGE.${1##*[n.]}" 2>/dev/null
    within 10 none_left "$1"
    rm -f "$LAB/run/"*"-$1" "$LAB/run/slurmd-$1.pid"
}

all_answer() {
    [ "$(SLURM_CONF=$CONF timeout 10 sinfo -h -N -p main -t idle,alloc,mix,comp -o %N 2>/dev/null |
        sort -u)" = "$(sort <<<"$NAMES")" ]
}
print_env() { printf "export SLURM_CONF=%q\nexport PATH=%q:\$PATH\n" "$CONF" "$BIN"; }
# shellcheck disable=SC1091
settings() { . "$LAB/run/settings" 2>/dev/null || die "the cluster is not up"; }
up() {
    stop
    find_programs
    if ! mkdir -p "$LAB" || ! rm -rf "${LAB:?}"/*; then die "cannot write $LAB"; fi
    mkdir "$LAB"/{bin,dev,etc,log,run,spool,state}
    : >"$LAB/.slurm-lab"
    if [ -n "$OWNER" ]; then setsid "$BASH" "$SELF" _watch &>/dev/null </dev/null & fi
    pick_place
    for i in MODE NAMES NET BRIDGE STEPD BIN PATH; do echo "$i=${!i@Q}"; done >"$LAB/run/settings"
    write_conf
    start_controller || fail "the controller did not start" controller
    for name in $NAMES; do node_up "$name" || fail "node $name did not start" "$name.start"; done
    within 60 all_answer || fail "the nodes did not come up" slurmctld.log
}
stop() {
    within 20 none_left
    grep -lsxF "$LAB" /sys/class/net/*/ifalias | cut -d/ -f5 | xargs -rn1 ip link del 2>/dev/null
}

case ${1:-} in
    up | down) # one at a time; -o: the daemons must not inherit the lock
        check
        mkdir -p "$cache"
        exec flock -o -w 900 "$PACKAGES.lock" "$BASH" "$SELF" "_$1" ;;
    _up) (settings && all_answer) 2>/dev/null || up; settings; print_env ;;
    _down) stop; rm -rf "$LAB" ;;
    _node) settings; run_node "$2" ;;
    _watch) while [ -d "/proc/$OWNER" ]; do sleep 1; [ -d "$LAB" ] || exit; done; "$SELF" down ;;
    env) settings; print_env ;;
    node-down | node-up)
        settings
        grep -qxF -e "${2:-}" <<<"$NAMES" || die "there is no node ${2:-}, only ${NAMES//$'\n'/ }"
        "${1/-/_}" "$2" ;;
    *) sed -n '2,8s/^# \?//p' "$SELF"; exit 2 ;;
esac
exit
