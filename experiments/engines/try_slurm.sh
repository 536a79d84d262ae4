#!/bin/bash
# Installs a Slurm of one node on this machine (Debian, as root), submits a run of two processes,
# kills one of them, and checks that the job comes back and ends with the bits of one process.
#
#     bash experiments/engines/try_slurm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
place=$(mktemp -d)
export NPROC=2  # the same number of threads in every layout
flags=(--arch small_dropout --sample --epochs 6 --batch-size 64 --train-examples 1000 --shards 2
  --checkpoint-every 5st)

apt-get install -y -qq slurm-wlm munge > "$place/apt.log" 2>&1
cat > /etc/slurm/slurm.conf << END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
MpiDefault=none
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
mkdir -p "$place/state" "$place/spool" /run/munge
chown munge /run/munge
pgrep -x munged > /dev/null || runuser -u munge -- munged
slurmctld
slurmd
trap 'scancel --user root; pkill -x slurmd; pkill -x slurmctld' EXIT
for _ in $(seq 30); do
  sinfo --noheader --format=%t | grep -q idle && break
  sleep 1
done
sinfo

python experiments/run.py "${flags[@]}" --workdir "$place/straight" --quiet
job=$(sbatch --parsable --nodes=1 --ntasks-per-node=2 --output="$place/job.log" \
  experiments/engines/slurm.sh "${flags[@]}" --workdir "$place/run")
echo "Job $job is submitted."
until compgen -G "$place/run/checkpoints/[0-9]*" > /dev/null; do sleep 0.1; done
pkill -KILL -n -f "run.py --distributed.*$place/run"
echo "One process is killed."
for _ in $(seq 600); do
  squeue --noheader --jobs="$job" | grep -q . || break
  sleep 1
done
scontrol show job "$job" | grep -E "JobState|Restarts"
cat "$place/job.log"
for run in straight run; do
  python -c "import json, sys; print(sys.argv[1], json.load(open(sys.argv[1]))['params_sha256'])" \
    "$place/$run/report.json"
done | tee "$place/hashes"
[ "$(cut -d ' ' -f 2 "$place/hashes" | sort -u | wc -l)" = 1 ]
echo "The killed job came back and ended with the same bits."
