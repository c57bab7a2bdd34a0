#!/usr/bin/env bash
# One node's part of train.sbatch, run by srun on each: its log, its rank, its way to the other nodes, then run_train.sh.
set -euo pipefail
export NODE_RANK=$SLURM_NODEID
[ "$NODE_RANK" = 0 ] || exec >>"$JOB_LOG.node$NODE_RANK" 2>&1

# torchrun would go on trying for many minutes.
getent ahosts "$MASTER_ADDR" >/dev/null || {
  echo "$(uname -n) cannot resolve $MASTER_ADDR: set MASTER_ADDR to an address of the job's first node" >&2
  exit 1
}

# gloo, which checkpoints use beside nccl, listens where the node's own name leads. Where that is a loopback address, as
# in Debian's /etc/hosts, the others are refused ("connectFullMesh failed"): name the interface towards them instead.
if [ "$NNODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
  case $(getent ahosts "$(uname -n)") in
  "" | 127.* | ::1*)
    peer=$MASTER_ADDR
    [ "$NODE_RANK" != 0 ] || peer=$LAST_ADDR
    peer=$(getent ahosts "$peer" | awk 'NR == 1 { print $1 }')
    interface=$(ip -oneline route get "$peer" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
    if [ "$interface" != lo ]; then # all nodes on one machine: loopback is right
      echo "$(uname -n) is a loopback address to itself: gloo uses interface $interface (GLOO_SOCKET_IFNAME)"
      export GLOO_SOCKET_IFNAME=$interface
    fi
    ;;
  esac
fi
exec "$(dirname "${BASH_SOURCE[0]}")/../../run_train.sh" "$@"
