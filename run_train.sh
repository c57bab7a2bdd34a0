#!/usr/bin/env bash
# Train: check the configuration, then start one process per GPU (or NGPU processes on CPU) on this node.
#
#   CONFIG_FILE=train_configs/lt2_1.3b.toml ./run_train.sh --training.steps 1000
#
#   CONFIG_FILE  TOML file                            (default: train_configs/lt2_debug.toml)
#   NGPU         processes on this node               (default: the GPUs seen, else 1)
#   PYTHON       interpreter                          (default: .venv's if there is one, else python3)
#   LOG_RANK     ranks whose output is shown, "0,1"   (default: 0; on several nodes: of each node)
#   COMM_MODE    as --comm.mode: "fake_backend" tries the layout of NGPU processes out in one, on CPU
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT          several nodes; scripts/slurm/train.sbatch sets them
# Everything after the script is an override, --section.field value; --help lists them all.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$here/.venv/bin/python" ] && python=$here/.venv/bin/python || python=python3; }

config_file=${CONFIG_FILE:-train_configs/lt2_debug.toml}
# The default and the recipes' names work from any folder.
[ -e "$config_file" ] || [ ! -e "$here/$config_file" ] || config_file=$here/$config_file
if [ -z "${NGPU:-}" ]; then
  NGPU=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  [ "$NGPU" -gt 0 ] || NGPU=1
fi
NNODES=${NNODES:-1}
export NGPU NNODES
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

mode=${COMM_MODE:-default} previous=
for argument in "$@"; do
  [ "$previous" != --comm.mode ] || mode=$argument
  case $argument in --comm.mode=*) mode=${argument#*=} ;; esac
  previous=$argument
done
[ -z "${COMM_MODE:-}" ] || set -- --comm.mode "$mode" "$@"
export COMM_MODE=$mode

# Refuse a bad configuration in a second and with one message, before torch starts.
"$python" -m lt2titan.config --job.config_file "$config_file" "$@"
for argument in "$@"; do
  case $argument in -h | --help) exit 0 ;; esac
done
# A job script checks once, before it starts the nodes.
[ -z "${CHECK_ONLY:-}" ] || exit 0

[ "$COMM_MODE" != fake_backend ] || exec "$python" -m lt2titan.train --job.config_file "$config_file" "$@"

# torchrun would set one thread per process; share the cores instead.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc knows of CPU masks, macOS knows no nproc
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
# libgomp's threads spin for milliseconds at each barrier by default; where anything else wants a core, that made training
# on two cores 20 times slower. Spinning for microseconds costs nothing when they are free.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

if [ "$NNODES" -gt 1 ]; then
  rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?several nodes need NODE_RANK}"
    --master-addr "${MASTER_ADDR:?several nodes need MASTER_ADDR}" --master-port "${MASTER_PORT:-29500}"
    --role "node$NODE_RANK.rank")
else
  # Ranks meet at localhost: a machine need not know its own name.
  rendezvous=(--nnodes 1 --rdzv-backend c10d --rdzv-endpoint localhost:0 --local-addr localhost --role rank)
fi
exec "$python" -m torch.distributed.run --nproc-per-node "$NGPU" "${rendezvous[@]}" \
  --local-ranks-filter "${LOG_RANK:-0}" --tee 3 \
  -m lt2titan.train --job.config_file "$config_file" "$@"
