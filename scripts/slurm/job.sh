# shellcheck shell=bash
# What the scripts of this folder share. Change here how your cluster finds Python and the packages.

cd "$SLURM_SUBMIT_DIR" || exit 1 # where sbatch was called
# shellcheck disable=SC1091
[ -f .venv/bin/activate ] && . .venv/bin/activate # made by `make`; or: module load ..., conda activate ...

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch

# With checkpoints and auto_resume, a job that is queued again goes on where it was.
# shellcheck disable=SC2034
common=(strategy=ddp sync_batchnorm=true checkpoint.enabled=true auto_resume.enabled=true)

# Runs a command to its end. When the job is told to stop, at the end of its time (--signal) or by a preemption, the run
# is told, saves and ends, and the job is queued again; one that somebody cancels is not.
requeueing() {
  local asked=0 code=0
  trap 'asked=1; scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null' TERM # for what srun started, not for this shell
  "$@" &
  while :; do
    wait "$!"
    code=$?
    kill -0 "$!" 2>/dev/null || break # else a signal ended the waiting
  done
  # 143: the run was told directly
  if [ "$code" -eq 143 ] || { [ "$asked" -eq 1 ] && [ "$code" -ne 0 ]; }; then
    [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
