#!/bin/bash
# One run for each line of a file, as an array of jobs, at most four at a time:
#   sbatch --array=1-$(wc -l < scripts/cluster/runs.txt)%4 scripts/cluster/slurm_array.sh scripts/cluster/runs.txt
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
#SBATCH --output=slurm-%x-%A-%a.log
set -u

cd "${SLURM_SUBMIT_DIR:-.}"
# Words are split at blanks, and nothing else in the line is interpreted: no quotes.
read -r -a words <<< "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
if [ "${#words[@]}" -eq 0 ]; then echo "$1 has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; fi
# In place of this shell, so that SLURM's signal reaches the next one.
exec bash scripts/cluster/slurm_run.sh "${words[@]}"
