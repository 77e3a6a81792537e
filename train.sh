#!/usr/bin/env bash
#SBATCH --job-name=l2p
#SBATCH --output=%x-%j.out
#SBATCH --error=%x-%j.err
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#
# Trains and evaluates L2P with one process on each GPU (one on the CPU where there is none).
#
#   bash train.sh digits_l2p                                      the embedded example
#   bash train.sh --data-path DIR                                 Split CIFAR-100 as the original
#   sbatch --gpus-per-node=4 train.sh --data-path DIR             the same under Slurm
#   sbatch --nodes=2 --gpus-per-node=4 train.sh --data-path DIR   on two nodes
#   sbatch --array=42-44 train.sh digits_l2p                      one job for each seed
#
# All arguments go to main.py: configurations and flags, see python main.py --help. Under Slurm there
# are as many processes as sbatch is given tasks (--ntasks-per-node), or else GPUs.
#
# Two minutes before its time limit a job saves its state and puts itself back into the queue; when
# it starts again, for this or another reason, it resumes from there.
set -euo pipefail

# Slurm runs a copy of this file from a folder of its own, but in the folder that sbatch was called in.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/main.py" ] || here=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$here/main.py" ] || { echo "call sbatch in the folder of train.sh" >&2; exit 2; }

. "$here/environment.sh"
use_environment "$here" "$here/requirements.txt"

run_here() {
    local processes=1
    if [ "${SLURM_STEP_NUM_TASKS:-1}" -eq 1 ]; then # else srun has started them
        processes=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    fi
    export L2P_COMMAND # how main.py says that it is called again
    L2P_COMMAND="bash $(printf %q "$0")"
    if [ "$processes" -eq 1 ]; then
        exec python "$here/main.py" "$@"
    fi
    exec python -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
        --nproc_per_node="$processes" "$here/main.py" "$@"
}

run_in_batch_job() {
    local nodes tasks per_node cpus step ended code=0 warned='' signalled=yes
    nodes=$SLURM_JOB_NUM_NODES
    tasks=${SLURM_NTASKS:-$((nodes * ${SLURM_GPUS_ON_NODE:-1}))}
    per_node=$(((tasks + nodes - 1) / nodes))
    cpus=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        set -- "$@" --resume auto
    fi
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        set -- "$@" --seeds "$SLURM_ARRAY_TASK_ID" # in a folder of its own
    fi
    trap 'signalled=yes warned=yes; kill -USR1 "$step"' USR1
    trap 'signalled=yes' TERM # the processes get it, too, and save their state
    srun --nodes="$nodes" --ntasks="$tasks" --ntasks-per-node="$per_node" \
        --cpus-per-task="$((cpus > 0 ? cpus : 1))" --overcommit --kill-on-bad-exit=1 --unbuffered \
        python "$here/main.py" "$@" &
    step=$!
    while [ -n "$signalled" ]; do # a signal ends the wait, not the step
        signalled=''
        ended=0
        wait "$step" || ended=$?
        [ "$ended" -eq 127 ] || code=$ended # 127: the wait before this one was the last
    done
    # 75: saved; else ended by a signal: after saving (143: Slurm ends the last ones so) or too early.
    if [ -n "$warned" ] && [[ $code =~ ^(75|137|138|143)$ ]]; then
        echo "The job goes back into the queue, and on from its last state."
        scontrol requeue "$SLURM_JOB_ID" && code=0
    fi
    exit "$code"
}

case ${BASH_SOURCE[0]} in
    */slurm_script) run_in_batch_job "$@" ;; # what Slurm calls its copy
    *) run_here "$@" ;;
esac
