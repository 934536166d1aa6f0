# shellcheck shell=bash
# Shared by the scripts in this folder. Adapt how your cluster finds Python and the packages.

cd "$SLURM_SUBMIT_DIR" || exit 1 # where sbatch was called
# shellcheck disable=SC1091
[ -f .venv/bin/activate ] && . .venv/bin/activate # made by `make`; or: module load ..., conda activate ...

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it from sbatch

# With checkpoints and auto_resume, a job that is queued again continues where it stopped.
# shellcheck disable=SC2034
common=(strategy=ddp sync_batchnorm=true checkpoint.enabled=true auto_resume.enabled=true)

# Runs a command. When SLURM signals the job, before its time limit (--signal) or at a preemption, the run receives the
# signal, saves and ends, and the job is queued again; a job that somebody cancels is not.
requeueing() {
  local signalled=0 code=0
  trap 'signalled=1; scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null' TERM # for what srun started, not for this shell
  "$@" &
  while :; do
    wait "$!"
    code=$?
    kill -0 "$!" 2>/dev/null || break # otherwise a signal interrupted `wait`
  done
  # 143: the run received the signal directly
  if [ "$code" -eq 143 ] || { [ "$signalled" -eq 1 ] && [ "$code" -ne 0 ]; }; then
    [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
