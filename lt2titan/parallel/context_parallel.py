"""Context parallelism: every rank has one stretch of each row, and mixers fetch what they need of earlier ones.

    attention      all-gathers keys and values (backward: reduce-scatter), and masks by where tokens stand in the row;
                   or passes them round in a ring (kernels/attention/ring.py).
    nsa, dsa       all-gather keys and values too, and the indexer's keys, and choose among those of the row so far.
    recurrences    all-gather what each stretch does to a state, (K + V) K numbers per head and row (model/stretch.py).
    convolutions, token shift    all-gather the last few tokens of each stretch.

Everything else looks at one token at a time. Parameters are sharded over these ranks too (FSDP2's shard axis), and
gradients summed over them with all others. Stretches are contiguous, in the order of the ranks: states can only pass
forward. So the last rank has the most keys to look at, (2 C - 1) / C of the mean of C ranks. Linear mixers cost all
ranks the same but for the states: rank r combines those of r - 1 before it, one product of (K, K) and (K, V) each.
"""

from __future__ import annotations

import logging

import torch
from torch.distributed.device_mesh import DeviceMesh

from lt2titan.config.section import ConfigError
from lt2titan.kernels.attention.ring import ring_problem
from lt2titan.model.lt2 import LT2
from lt2titan.model.mixers.dsa import DSA
from lt2titan.model.mixers.full import Full
from lt2titan.model.mixers.nsa import NSA
from lt2titan.model.shares import Share

logger = logging.getLogger("lt2titan")


def apply_context_parallel(
    model: LT2, mesh: DeviceMesh, attention: str = "gather", param_dtype: torch.dtype = torch.bfloat16
) -> None:
    """Let ``model`` take stretches of rows as its input, in place.

    Args:
        mesh: one-dimensional, over ranks that have stretches of the same rows, in their order.
        attention: "gather" or "ring".
        param_dtype: dtype of compute.

    Raises:
        ConfigError: a ring on a CPU, on plain PyTorch, or with a torch that has none; softmax attention in fp32 by GPU
            kernels, which the first rank could do and the others not.
    """
    # dsa too, which is that while its indexer warms up, and where rows are no longer than what it may choose.
    mixers = [block.mixer for block in model.core.blocks]
    softmax_on_gpu = any(isinstance(mixer, (Full, DSA, NSA)) and mixer.backend != "reference" for mixer in mixers)
    if softmax_on_gpu and param_dtype not in (torch.bfloat16, torch.float16):
        reason = "attention to keys of other ranks runs in bfloat16 on a GPU; use it, or context_parallel_degree = 1"
        raise ConfigError("training.mixed_precision_param", str(param_dtype).removeprefix("torch."), reason)
    if attention == "ring":
        if mesh.device_type != "cuda" or any(mixer.backend == "reference" for mixer in mixers):
            reason = 'needs GPUs, and their kernels (kernels.backend); use "gather"'
            raise ConfigError("parallelism.context_parallel_attention", "ring", reason)
        if problem := ring_problem():
            reason = f'does not run with torch {torch.__version__} ({problem}); use "gather"'
            raise ConfigError("parallelism.context_parallel_attention", "ring", reason)
    model.stretches = Share(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    model.is_ring = attention == "ring"
    logger.info(
        "context parallelism over %d ranks: each has 1/%d of every row; attention: %s",
        mesh.size(),
        mesh.size(),
        attention,
    )
