#!/bin/bash
# One run on all GPUs of a node, one process for each:
#   sbatch --gpus-per-node=4 scripts/cluster/slurm_node.sh trainer.parallel=ddp trainer.micro_batch_size=4 method=mixlora model=llama2_7b task=multi
# The batch is split among the processes. It did not run on several GPUs yet.
#SBATCH --job-name=mixlora-exp
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -u

cd "${SLURM_SUBMIT_DIR:-.}"
"${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" train.py "$@" &
run=$!
stopped=0
trap 'stopped=1; kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do code=0; wait "$run" || code=$?; done
# torchrun ends with a code of its own if the processes were ended by a signal.
if [ "$code" -ne 0 ] && [ "$stopped" -eq 1 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
