#!/bin/bash
# Four machines of eight GPUs under SLURM, queued again until the run is finished:
#
#     sbatch recipes/accelerate/slurm.sh --config run.yaml
#
# SLURM sends SIGUSR1 to this shell five minutes before the end; it goes on to every training process, which saves and stops.
# Then the job is queued again and resumes. A run that fails by itself is not.
#SBATCH --job-name=hfcustom
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

CONFIG=${ACCELERATE_CONFIG:-recipes/accelerate/fsdp_4x8.yaml}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then set -- "$@" --resume; fi

stopping=
stop() { # torchrun runs its processes as `python -u script`, and passes no SIGUSR1 on
    stopping=yes
    srun --overlap --ntasks-per-node=1 pkill -USR1 -f -- '-u recipes/finetune.py'
}
trap stop USR1

# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --kill-on-bad-exit=1 bash -c \
    'accelerate launch --config_file "$1" --machine_rank "$SLURM_NODEID" --main_process_ip "$2" --main_process_port "$3" \
        recipes/finetune.py "${@:4}"' task "$CONFIG" "$FIRST" "$PORT" "$@" &
training=$!
while kill -0 $training 2>/dev/null; do # a signal interrupts wait
    wait $training
    code=$?
done

if [ -n "$stopping" ] && [ "$code" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
