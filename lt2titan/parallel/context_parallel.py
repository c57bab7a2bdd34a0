"""Context parallelism: every rank has one stretch of each row, and mixers fetch what they need of earlier ones.

    attention      all-gathers keys and values (backward: reduce-scatter), and masks by where tokens stand in the row;
                   or passes them round in a ring (kernels/attention/ring.py).
    recurrences    all-gather what each stretch does to a state, (K + V) K numbers per head and row (model/stretch.py).
    convolutions, token shift    all-gather the last few tokens of each stretch.

Everything else looks at one token at a time. Parameters are sharded over these ranks too (FSDP2's shard axis), and
gradients summed over them with all others. Stretches are contiguous, in the order of the ranks: states can only pass
forward. So the last rank has the most keys to look at, (2 C - 1) / C of the mean of C ranks; linear mixers cost every
rank the same.
"""

from __future__ import annotations

import logging

from torch.distributed.device_mesh import DeviceMesh

from lt2titan.config.section import ConfigError
from lt2titan.model.lt2 import LT2
from lt2titan.model.shares import Share

logger = logging.getLogger("lt2titan")


def apply_context_parallel(model: LT2, mesh: DeviceMesh, attention: str = "gather") -> None:
    """Let ``model`` take stretches of rows as its input, in place.

    Args:
        mesh: one-dimensional, over ranks that have stretches of the same rows, in their order.
        attention: "gather" or "ring".

    Raises:
        ConfigError: a ring on a CPU.
    """
    if attention == "ring" and mesh.device_type != "cuda":
        raise ConfigError("parallelism.context_parallel_attention", "ring", 'needs GPUs; use "gather"')
    model.stretches = Share(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    model.is_ring = attention == "ring"
    logger.info(
        "context parallelism over %d ranks: each has 1/%d of every row; attention: %s",
        mesh.size(),
        mesh.size(),
        attention,
    )
