#!/usr/bin/env bash
# Starts a real Slurm cluster of four nodes on this machine for the tests: two that stay up, and two
# in the partition `fragile`; the partition `later` starts no job before it is set UP. Each node has
# its own host name, address, processes and /dev/shm, by Linux namespaces.
#
#   slurm_cluster.sh up               start it and print lines that set SLURM_CONF and PATH
#   slurm_cluster.sh node-down NODE   cut the power of a node
#   slurm_cluster.sh node-up NODE     and switch it on again
#   slurm_cluster.sh down             kill jobs and daemons, remove the folder; twice is fine
#
# Needs root, and Slurm or apt-get: where Slurm is not installed, Debian's packages are unpacked
# into the user's cache. Nothing gets installed.
LAB=${SLURM_LAB:?a new folder for the cluster, a short absolute path}

set -u
umask 022
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin
CONF=$LAB/etc/slurm.conf
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}
PACKAGES=$cache/l2p-slurm-packages
SELF=$(readlink -f "${BASH_SOURCE[0]}")
NAMES=$'n1\nn2\nn3\nn4'

die() { echo "slurm_cluster: $*" >&2; exit 1; }
fail() { tail -n 8 "$LAB/log/$2" >&2; down; die "$1"; } # MESSAGE LOG
within() { # SECONDS COMMAND: waits until the command succeeds
    local end=$((SECONDS + $1))
    until "${@:2}"; do [ $SECONDS -lt $end ] && sleep 0.1 || return 1; done
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

pick_place() { # ports, addresses and a bridge that no other cluster of this machine uses
    local i
    unshare --pid --fork --kill-child --mount-proc --uts --net -m sh -c '
        echo x >/proc/sys/kernel/hostname && mount -t tmpfs x /mnt &&
        ip link add x type bridge && ip link add y type veth' &>/dev/null || die "no namespaces"
    for ((i = $(cksum <<<"$LAB" | cut -d' ' -f1); ; i++)); do
        PORT=$((10000 + 100 * (i % 200))) NET=10.213.$((i % 200)) BRIDGE=l2p$((i % 200))
        (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null || [ -e "/sys/class/net/$BRIDGE" ] || break
    done
}

write_conf() {
    local host
    host=$(uname -n) host=${host%%.*}
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
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=5
PartitionName=DEFAULT DefaultTime=60 MaxTime=INFINITE State=UP
PartitionName=main Nodes=n1,n2 Default=YES
PartitionName=fragile Nodes=n3,n4
PartitionName=later Nodes=n1,n2 State=DOWN
NodeName=DEFAULT CPUs=64 RealMemory=1000000
END
    printf '127.0.0.1 localhost\n%s %s\n' "$NET.254" "$host" >"$LAB/etc/hosts"
    for name in $NAMES; do
        i=${name#n}
        echo "NodeName=$name NodeHostname=$name NodeAddr=$NET.$i Port=$((PORT + i))" >>"$CONF"
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

start_controller() {
    local -x SLURM_CONF=$CONF SLURMD_NODENAME=controller
    ip link add "$BRIDGE" type bridge && ip link set "$BRIDGE" alias "$LAB" up &&
        ip addr add "$NET.254/24" dev "$BRIDGE" || return
    (umask 077 && head -c 128 /dev/urandom >"$LAB/etc/munge.key")
    # --force: munged wants a folder that all users can enter; a temporary folder may be closed.
    munged --force --key-file="$LAB/etc/munge.key" --socket="$LAB/run/munge.sock" --num-threads=4 \
        --pid-file="$LAB/run/munged.pid" --seed-file="$LAB/run/seed" --log-file="$LAB/log/munged" &&
        slurmctld -c
} &>"$LAB/log/controller" </dev/null
node_up() { # NAME
    local -x SLURM_CONF=$CONF SLURMD_NODENAME=$1
    local outer init i=${1#n}
    mkdir -p "$LAB/log/$1"
    setsid unshare --pid --fork --kill-child --mount-proc --uts --net -m \
        "$BASH" "$SELF" _node "$1" &
    outer=$! && disown && echo $outer >"$LAB/run/outer-$1"
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
    ip link del "$BRIDGE.${1#n}"
    kill -KILL "$(<"$LAB/run/outer-$1")" # and with it all processes of the node
    rm -f "$LAB/run/"*"-$1" "$LAB/run/slurmd-$1.pid"
} 2>/dev/null

all_answer() {
    [ "$(SLURM_CONF=$CONF timeout 10 sinfo -h -N -t idle,alloc,mix,comp -o %N 2>/dev/null |
        sort -u)" = "$NAMES" ]
}
up() {
    find_programs
    mkdir -p "$LAB"/{bin,etc,log,run,spool,state} || die "cannot write $LAB"
    pick_place
    for i in NET BRIDGE STEPD BIN PATH; do echo "$i=${!i@Q}"; done >"$LAB/run/settings"
    write_conf
    start_controller || fail "the controller did not start" controller
    for name in $NAMES; do node_up "$name" || fail "node $name did not start" "$name.start"; done
    within 60 all_answer || fail "the nodes did not come up" slurmctld.log
    printf "export SLURM_CONF=%q\nexport PATH=%q:\$PATH\n" "$CONF" "$BIN"
}
down() {
    for name in $NAMES; do node_down "$name"; done
    xargs -r kill -KILL < <(cat "$LAB"/run/{slurmctld,munged}.pid) 2>/dev/null
    ip link del "$BRIDGE" 2>/dev/null
    rm -rf "$LAB"
}

case ${1:-} in
    up) # one at a time; -o: the daemons must not inherit the lock
        [ "$(id -u)" = 0 ] || die "must be root"
        mkdir -p "$cache" && exec flock -o -w 900 "$PACKAGES.lock" "$BASH" "$SELF" _up ;;
    _up) up ;;
    _node | node-down | node-up | down)
        . "$LAB/run/settings" || die "the cluster is not up"
        case $1 in _node) run_node "$2" ;; *) "${1/-/_}" "${@:2}" ;; esac ;;
    *) sed -n '2,13s/^# \?//p' "$SELF"; exit 2 ;;
esac
