#!/usr/bin/env bash
#SBATCH --job-name=l2p
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --error=%x-%j.err
#
# Trains and evaluates L2P with one process on each GPU (one on the CPU where there is none).
#
#   bash train.sh digits_l2p                         the embedded example
#   bash train.sh --data-path DIR                    Split CIFAR-100 as the original ran it
#   sbatch --gpus=4 train.sh --data-path DIR         the same under Slurm
#
# All arguments go to main.py: configurations and flags, see python main.py --help.
set -euo pipefail

# Slurm runs a copy of this file from a folder of its own, but in the folder that sbatch was called in.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -f "$here/main.py" ] || here=${SLURM_SUBMIT_DIR:-$PWD}
[ -f "$here/main.py" ] || { echo "call sbatch in the folder of train.sh" >&2; exit 2; }

. "$here/environment.sh"
use_environment "$here" "$here/requirements.txt"

processes=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
if [ "$processes" -eq 1 ]; then
    exec python "$here/main.py" "$@"
fi
exec python -m torch.distributed.run --standalone --nproc_per_node="$processes" "$here/main.py" "$@"
