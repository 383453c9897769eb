#!/bin/bash
# A Ray cluster inside one Slurm allocation, and a job in it:
#
#   sbatch examples/clusters/slurm.sh /shared/job.yaml /shared/runs/one --set parallel.workers=8 --set parallel.device=cuda
#
# Model, texts, run folder and the environment lie on storage that every node sees. Sent again, it goes on where it was stopped.
# Without GPUs leave out --gpus-per-node.
#SBATCH --job-name=rayprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

job=$1 out=$2
shift 2
port=6379
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{ print $1 }')
gpus=${SLURM_GPUS_ON_NODE:-0}

# Without the token whoever reaches the ports can run code.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

srun --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --node-ip-address="$address" --port=$port --dashboard-host=127.0.0.1 \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
        ray start --address="$address:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" --block &
fi

# The driver waits for the other nodes; Slurm's signal ends it, and finished tasks are kept.
srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    rayprune run "$job" --out "$out" --set cluster.address="$address:$port" --set cluster.wait_seconds=600 "$@"
