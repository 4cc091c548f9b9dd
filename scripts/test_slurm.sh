#!/usr/bin/env bash
# Campaigns on a real Slurm of two nodes on this machine, without root: `scripts/test_slurm.sh [SCENES [KILLS [TASKS_AT_A_TIME]]]`.
# Slurm comes from the machine if it is installed, else from Debian's or Ubuntu's packages, unpacked into a temporary
# folder. Tiny scenes are lifted as one array while tasks are killed and requeued at random (tests/slurm_campaign.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
work=$(mktemp -d)
# Hundreds of processes start: each reads what the first has compiled.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$work/bytecode

stop() {
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 15); do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 1
    done
    for name in slurmd.node1 slurmd.node2 slurmctld; do
        [ ! -s "$work/$name.pid" ] || kill "$(cat "$work/$name.pid")" 2>/dev/null || true
    done
    sleep 2
    [ -n "${KEEP:-}" ] || rm -rf "$work"
}
trap stop EXIT

plugins=$(ls -d /usr/lib/*/slurm-wlm /usr/lib64/slurm 2>/dev/null | head -1 || true)
if command -v slurmctld slurmd sbatch >/dev/null; then
    controller=slurmctld daemon=(slurmd)
else
    mkdir "$work/packages"
    (cd "$work/packages" && apt-get -qq -o APT::Sandbox::User=$(id -un) download slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libmunge2)
    for package in "$work"/packages/*.deb; do dpkg -x "$package" "$work/root"; done
    libraries=$(dirname "$(find "$work/root" -type d -name slurm-wlm -path '*/lib/*')")
    plugins=$libraries/slurm-wlm
    export LD_LIBRARY_PATH=$plugins:$libraries PATH=$work/root/usr/bin:$PATH
    controller=$work/root/usr/sbin/slurmctld-wlm
    daemon=("$work/root/usr/sbin/slurmd-wlm" -d "$work/root/usr/sbin/slurmstepd-wlm")
fi

mkdir -p "$work/state" "$work/spool/node1" "$work/spool/node2"
read -r controller_port port1 port2 < <("$python" -c "
import socket
sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in sockets))")
cores=$((($(nproc --all) + 1) / 2))
export SLURM_CONF=$work/slurm.conf
# Nobody is authenticated, no accounts are kept, and a requeued task waits 5 s instead of two minutes.
cat >"$SLURM_CONF" <<END
ClusterName=fit3d
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$controller_port
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
PluginDir=$plugins
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=1
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.%n.log
MpiDefault=none
KillWait=2
MessageTimeout=60
JobRequeue=1
NodeName=node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$port1 CPUs=$cores State=UNKNOWN
NodeName=node2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$port2 CPUs=$cores State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
"$controller" -f "$SLURM_CONF"
for node in node1 node2; do "${daemon[@]}" -f "$SLURM_CONF" -N "$node"; done
for _ in $(seq 30); do
    [ "$(sinfo --noheader --format=%D:%t 2>/dev/null)" != 2:idle ] || break
    sleep 1
done
sinfo
mkdir "$work/campaign"
"$python" -m tests.slurm_campaign "$work/campaign" "${1:-230}" "${2:-20}" "${3:-2}"
[ -z "$(squeue --noheader)" ] || { echo "test_slurm.sh: tasks are left in the queue." >&2 && exit 1; }
