#!/bin/bash
# One run in several processes under Slurm:
#
#     sbatch experiments/engines/slurm.sh --arch sprint_94 --shards 8 --workdir /shared/run
#
# A lost process ends the others with status 75. The job then puts itself back into the queue, and
# the run resumes from its last checkpoint. The folder of the run is on a shared file system.
#SBATCH --job-name=fmnist_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60

# A minute before the time limit, the processes get SIGTERM, save and stop.
srun --kill-on-bad-exit=1 python experiments/run.py --distributed "$@"
status=$?
case $status in
  75 | 137 | 134 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # lost, killed, or stopped and saved
esac
exit $status
