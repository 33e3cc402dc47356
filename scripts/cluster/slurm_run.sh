#!/bin/bash
# One run on one GPU, requeued until it is done:
#   sbatch scripts/cluster/slurm_run.sh method=mixlora model=llama2_7b task=multi
# Five minutes before the time limit SLURM signals this script; the run then writes a checkpoint and
# ends with exit code 75, and the requeued job resumes from there.
#SBATCH --job-name=mixlora-exp
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -u

cd "${SLURM_SUBMIT_DIR:-.}"
"${PYTHON:-.venv/bin/python}" train.py "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
# A signal ends the first wait before the run has ended.
while kill -0 "$run" 2>/dev/null; do code=0; wait "$run" || code=$?; done
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
