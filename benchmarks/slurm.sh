#!/usr/bin/env bash
# Start a Slurm of one node on this machine, with accounting, run a command, show its jobs, stop it.
#
#   apt-get install slurm-wlm slurmdbd munge mariadb-server
#   bash benchmarks/slurm.sh snakemake --profile workflow/profiles/slurm --config samples=samples.tsv
#
# Needs root, no systemd and no Slurm of the machine's own: all that it does lives in a temporary
# folder and listens on 127.0.0.1 only; its settings are in /etc/slurm while it runs. However it ends,
# by Ctrl-C too, it cancels the jobs that are left and stops its daemons. CARD=1 lets the node say
# that it has a graphics card, which is /dev/zero: for the scheduler only. CPUS=1 (default: all) is
# the number of its cores.
set -euo pipefail

for program in munged mariadbd slurmdbd slurmctld slurmd sacct; do
    command -v "$program" >/dev/null || {
        printf 'error: %s is not installed.\nRun: apt-get install slurm-wlm slurmdbd munge mariadb-server\n' "$program" >&2
        exit 2
    }
done

conf=/etc/slurm
if [ -e "$conf/slurm.conf" ]; then
    printf 'error: %s/slurm.conf is there: this machine has a Slurm of its own.\nRun the command in that one.\n' "$conf" >&2
    exit 2
fi
work="$(mktemp -d)"
chmod 755 "$work"
mkdir -p "$conf"
host="$(hostname -s)"
command=""
pids=() # of the daemons, the last started first
spool="$work/spool"

# steps: whether some step of a job has not ended; each has a socket of its own here
steps() { compgen -G "$spool/${host}_*" >/dev/null; }

# left: processes of the command and its jobs, which have its environment; Slurm without control groups
# may lose some that do not end when told to
left() { grep -lszxF "ONE_NODE_SLURM=$work" /proc/[0-9]*/environ | cut -d/ -f3; }

# ended PID: wait for it, for at most 10 seconds, and kill it then
ended() {
    for _ in $(seq 100); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null || true
}

stop() {
    trap '' INT TERM HUP # once is enough
    if [ -n "$command" ]; then
        kill "$command" 2>/dev/null || true
        ended "$command"
    fi
    if steps; then
        timeout 10 scancel --quiet --user="$(id -un)" || true
        for _ in $(seq 150); do # KillWait is over then
            steps || break
            sleep 0.1
        done
    fi
    for pid in $(left); do kill -KILL "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        ended "$pid"
    done
    rm -rf "$work" "$conf"/{slurm,slurmdbd,gres}.conf
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# start NAME COMMAND...: in the background, its output in $work/NAME.log
start() {
    "${@:2}" >"$work/$1.log" 2>&1 &
    pids=("$!" "${pids[@]}")
}

# until_ok WHAT COMMAND...: wait until it succeeds, for at most two minutes
until_ok() {
    for _ in $(seq 240); do
        if "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    printf 'error: %s does not answer. The logs:\n' "$1" >&2
    tail -n 5 "$work"/*.log >&2
    exit 1
}

mkdir -m 700 "$work/munge" "$work/state" "$spool" "$work/db"
dd if=/dev/urandom of="$work/munge/key" bs=1024 count=1 status=none
chmod 400 "$work/munge/key"
socket="$work/munge.socket"
start munged munged --foreground --force --key-file="$work/munge/key" --socket="$socket" \
    --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" --log-file="$work/munge/log"

mariadb-install-db --user=root --datadir="$work/db" --auth-root-authentication-method=normal \
    >"$work/install.log" 2>&1
start mariadb mariadbd --no-defaults --user=root --datadir="$work/db" --socket="$work/db.socket" \
    --bind-address=127.0.0.1 --port=33306 --pid-file="$work/db.pid"
sql=(mariadb --no-defaults --user=root --socket="$work/db.socket" --execute)
until_ok mariadb "${sql[@]}" 'select 1'
"${sql[@]}" "create user slurm@127.0.0.1; grant all on slurm.* to slurm@127.0.0.1;"

cat >"$conf/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=localhost
SlurmUser=root
PidFile=$work/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=33306
StorageUser=slurm
StorageLoc=slurm
END
chmod 600 "$conf/slurmdbd.conf"
memory="$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)"
cat >"$conf/slurm.conf" <<END
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$socket
SlurmUser=root
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
StateSaveLocation=$work/state
SlurmdSpoolDir=$spool
ProctrackType=proctrack/linuxproc
KillWait=5
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass=$socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-$(nproc)} RealMemory=$memory ${CARD:+Gres=gpu:1}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
[ -z "${CARD:-}" ] || echo "NodeName=$host Name=gpu File=/dev/zero" >"$conf/gres.conf"
until_ok munged munge --socket="$socket" --no-input
start slurmdbd slurmdbd -D
until_ok slurmdbd sacctmgr --immediate show cluster
sacctmgr --immediate add cluster one >"$work/cluster.log" 2>&1
start slurmctld slurmctld -D
start slurmd slurmd -D
until_ok slurmd srun --immediate=30 --mem=100 true

# In the background, so that a signal is answered at once; the command is then told to end first.
code=0
env "ONE_NODE_SLURM=$work" "$@" &
command=$!
wait "$command" || code=$?
command=""
sleep 3 # until the last job is accounted for
printf '\nThe jobs of this Slurm:\n'
sacct --allocations --units=M \
    --format=JobID,Comment%32,State,ExitCode,AllocTRES%48,Submit,Start,End,Elapsed
printf '\nPeak memory of their steps:\n'
sacct --units=M --format=JobID,JobName,MaxRSS,ReqMem,TotalCPU
exit "$code"
