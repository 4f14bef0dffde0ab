#!/usr/bin/env bash
# Runs scripts/slurm_fit.sbatch on a SLURM of its own, on this machine, and sees that nothing is lost: signals while importing and in training, requeue,
# kill -9 of a rank, a drained node, an array, two jobs with one folder. The log is kept in docs/slurm_check.log. Takes about ten minutes on two cores.
#   sudo bash scripts/slurm_check.sh [--seed N]
# Needs Debian or Ubuntu, and root: it installs slurm-wlm and munge where they are missing. The SLURM has its own key, ports and folder, and goes when
# the script ends. Where another SLURM is, the script does not start.
# Environment: PYTHON (python, with cpq_train installed).
set -euo pipefail
cd "$(dirname "$0")/.."

accepted="accepted: a machine without a SLURM of its own"
refuse() {
  echo "slurm_check: $1" >&2
  exit 2
}

[ -z "${SLURM_CONF:-}${SLURM_JOB_ID:-}" ] || refuse "SLURM_CONF or SLURM_JOB_ID is set: this machine belongs to a SLURM; $accepted"
! pgrep -x 'slurm(ctld|d|dbd)' > /dev/null || refuse "a SLURM is running here; $accepted"
for conf in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf; do
  [ ! -e "$conf" ] || refuse "$conf configures a SLURM; $accepted"
done
[ "$(id -u)" -eq 0 ] || refuse "not root; accepted: root, as which SLURM's daemons start"
if ! { command -v slurmctld && command -v slurmd && command -v sbatch && command -v munged; } > /dev/null; then
  apt-get update > /dev/null
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge > /dev/null
fi

folder=$(mktemp -d /tmp/slurm_check.XXXXXX)
chmod 755 "$folder"
host=$(hostname -s)
cpus=$(nproc)
export SLURM_CONF=$folder/slurm.conf
mkdir -p "$folder"/{munge,state,spool}
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown -R munge: "$folder/munge"
chmod 400 "$folder/munge/key"
cat > "$SLURM_CONF" << CONF
ClusterName=slurmcheck
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF

end() {
  scancel --quiet --state=PENDING 2> /dev/null || true
  scancel --quiet --signal=KILL --state=RUNNING 2> /dev/null || true
  for name in slurmctld slurmd munge/munged; do
    [ ! -f "$folder/$name.pid" ] || kill "$(cat "$folder/$name.pid")" 2> /dev/null || true
  done
  sleep 1
  rm -rf "$folder"
}
trap end EXIT

runuser -u munge -- munged --socket="$folder/munge/socket" --key-file="$folder/munge/key" --pid-file="$folder/munge/munged.pid" \
  --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
status=0
PYTHONPATH=$PWD OMP_NUM_THREADS=1 "${PYTHON:-python}" scripts/slurm_check.py --output "$folder/runs" "$@" > "$folder/log" || status=$?
cat "$folder/log"
[ "$status" -ne 0 ] || cp "$folder/log" docs/slurm_check.log
exit "$status"
