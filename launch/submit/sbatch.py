"""The script of a Slurm job: a Ray cluster of the job's own, and the driver in the batch step.

The driver runs on the first node as a child of the script, so its exit code is the job's and SIGTERM
reaches it. The token is made on the node, in a folder of mode 0700, and known to processes by its path
only.
"""

from __future__ import annotations

from launch.submit.job import Job, entrypoint, shell
from launch.submit.slurm_settings import CONFIG

ROLE_LABEL = "quartet.role."  # launch/cluster.py places a role where a node carries its label

SCRIPT = r"""
set -euo pipefail
log() { printf '[start] %s\n' "$*"; }
umask 077
folder=@FOLDER@
export attempt=$folder/restart-${SLURM_RESTART_COUNT:-0}
mkdir -p "$attempt"
export PATH=@BIN@:$PATH PYTHONPATH=@ROOT@ RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$attempt/token
export RAY_USAGE_STATS_ENABLED=0 QUARTET_RAY_VERSION=@RAY@ @ENVIRONMENT@
unset RAY_AUTH_TOKEN
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address_of() { scontrol show node "$1" -o | grep -oP 'NodeAddr=\K\S+'; }
name=$(address_of "${nodes[0]}")
head=$(getent ahostsv4 "$name" | awk 'NR == 1 { print $1 }')
log "allocated: ${#nodes[@]} nodes (${nodes[*]}), restart ${SLURM_RESTART_COUNT:-0}"

driver=
waiter=
pids=()
finish() {
    code=$?
    trap - EXIT TERM USR1
    for pid in "${pids[@]}" $waiter; do kill "$pid" 2>/dev/null || true; done
    wait || true
    exit "$code"
}
trap finish EXIT
# TERM: `quartet stop`. USR1: the time limit is near. Both end with a checkpoint; only the second
# queues the job again.
requeue=
stopping=
trap 'stopping=1; if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; else exit 143; fi' TERM
trap 'requeue=@REQUEUE@; [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true' USR1

# One word per node: the labels of the roles that live there, or "-".
labels=(@LABELS@)
label_option() { [ "$1" = - ] || printf -- '--labels=%s' "$1"; }

ray start --head --block $(label_option "${labels[0]}") --node-ip-address="$head" --port=@PORT@ \
    --dashboard-host=127.0.0.1 --dashboard-port=@DASHBOARD@ @RAY_OPTIONS@ \
    > "$attempt/head.log" 2>&1 & pids+=($!)
deadline=$((SECONDS + @DEADLINE@))
until ray health-check --address "$head:@PORT@" > /dev/null 2>&1; do
    kill -0 "${pids[0]}" 2>/dev/null || { cat "$attempt/head.log"; echo "the Ray head died"; exit 1; }
    ((SECONDS < deadline)) || { echo "no Ray head in @DEADLINE@ s: $attempt/head.log"; exit 1; }
    sleep 0.5
done

if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    # --export=ALL: sbatch's --export=NIL would go on to this step, and it would have no PATH and no token.
    # One step for all workers; each finds its own address towards the head.
    srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="${nodes[0]}" --overlap \
        --export=ALL \
        --output="$attempt/worker-%t.log" \
        /bin/bash -c 'labels=('"${labels[*]:1}"'); mine=${labels[$SLURM_PROCID]}
            if [ "$mine" = - ]; then mine=; else mine=--labels=$mine; fi
            ray start --block --address='"$head:@PORT@"' $mine @RAY_OPTIONS@ || code=$?
            echo "${code:-0}" > "$attempt/worker-$SLURM_PROCID.ended"; exit "${code:-0}"' & pids+=($!)
fi
# In the background: bash hears a signal during `wait`, not during a command.
python -m launch.submit.wait_for_nodes "$head:@PORT@" "${#nodes[@]}" @DEADLINE@ "$attempt" "${pids[@]}" &
waiter=$!
if ! wait "$waiter"; then
    tail -n 20 "$attempt"/worker-*.log || true
    exit 1
fi
waiter=

export RAY_ADDRESS=$head:@PORT@
resume=(@RESUME@)
((${SLURM_RESTART_COUNT:-0} == 0)) || resume=(--resume)
@COMMAND@ "${resume[@]}" & driver=$!
code=0
wait "$driver" || code=$?
# A signal ends `wait` before the driver ends.
while kill -0 "$driver" 2>/dev/null; do code=0; wait "$driver" || code=$?; done
# A lost node ends the driver before Slurm has noticed; the step of the workers ends with it. So it does when
# the job is cancelled, which is not to come back.
if [ -z "$stopping" ] && ((code == 1 && ${#pids[@]} > 1)); then
    for _ in {1..60}; do
        kill -0 "${pids[1]}" 2>/dev/null || { echo "a node was lost"; requeue=@REQUEUE@; code=75; break; }
        sleep 0.5
    done
fi
if [ -n "$requeue" ] && ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
echo "$code" > "$attempt/exit_code"
exit "$code"
"""


def labels(settings: CONFIG) -> list[str]:
    """One word per node, e.g. ["quartet.role.actor=true,quartet.role.critic=true", "-"]."""
    per_node = [*settings.node_roles, *[""] * settings.nodes][: settings.nodes]
    return [
        ",".join(f"{ROLE_LABEL}{role}=true" for role in roles.split("+") if role) or "-" for roles in per_node
    ]


def script(job: Job, settings: CONFIG, *, folder: str, root: str, ray: str) -> str:
    """The text for sbatch's standard input; holds no secret."""
    options = {
        "job-name": job.id,
        "nodes": str(settings.nodes),
        "ntasks-per-node": "1",
        "output": f"{folder}/log",
        "open-mode": "append",
        "signal": f"B:USR1@{settings.stop_grace_s}",
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.time,
        "gres": f"gpu:{settings.gpus_per_node}" if settings.gpus_per_node else None,
    }
    flags = ["#SBATCH --exclusive", "#SBATCH --requeue" if settings.requeue else "#SBATCH --no-requeue"]
    flags += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    flags += [f"#SBATCH {line}" for line in settings.extra]
    ray_options = [f"--num-gpus={settings.gpus_per_node}"]
    if settings.cpus_per_node:
        ray_options.append(f"--num-cpus={settings.cpus_per_node}")
    if settings.object_store_mb:
        ray_options.append(f"--object-store-memory={settings.object_store_mb * 2**20}")
    python = f"{settings.python_folder}/python"
    values = {
        "FOLDER": shell([folder]),
        "BIN": shell([settings.python_folder]),
        "ROOT": shell([root]),
        "RAY": ray,
        "ENVIRONMENT": " ".join(shell([f"{k}={v}"]) for k, v in sorted(settings.environment.items())),
        "REQUEUE": "1" if settings.requeue else "",
        "PORT": str(settings.port),
        "DASHBOARD": str(settings.dashboard_port),
        "RAY_OPTIONS": shell(ray_options),
        "LABELS": " ".join(labels(settings)),
        "DEADLINE": str(settings.start_deadline_s),
        "RESUME": "--resume" if job.resume else "",
        "COMMAND": shell(
            entrypoint(f"{folder}/run.yaml", resume=False, secrets=settings.secrets, python=python)
        ),
    }
    text = SCRIPT
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return "\n".join(["#!/bin/bash", *flags, text.lstrip("\n")])
