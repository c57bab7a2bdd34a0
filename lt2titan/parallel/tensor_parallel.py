"""Tensor parallelism by heads, channels and words, with the residual stream split by tokens (sequence parallelism).

Every norm ends by making its output ready for ranks that use it for heads of their own, and every mixer, SwiGLU and the
embedding end by summing what the ranks give:

    sequence parallel   the residual stream (rho and the norms too) has 1/n of the tokens on each rank; norms gather all
                        tokens (all-gather; backward reduce-scatter), sublayers scatter their sum (the reverse).
    without             it is whole on every rank; the sum is an all-reduce, and so is the norms' backward pass.

Parameters become DTensors over the tensor axis before FSDP2 shards them further. Gradients of those that are whole on
every rank (o_norm, low-rank maps, B and C of Mamba-2, key heads that ranks share, under sequence parallelism norms and
rho) are summed over the axis when FSDP2 reduces them: once per backward pass, whatever the number of loops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from lt2titan.model.layers import RMSNorm
from lt2titan.model.lt2 import LT2
from lt2titan.model.shares import Share, gather_tokens, sum_and_split_tokens, sum_shares, to_shares
from lt2titan.parallel.config.tensor_parallel import check_tensor_parallel

logger = logging.getLogger("lt2titan")


def apply_tensor_parallel(model: LT2, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Lay ``model``, on ``meta``, out over ``mesh``, in place; FSDP2 comes after.

    Args:
        mesh: one-dimensional, over ranks that see the same tokens.

    Raises:
        ConfigError: sizes that the ranks cannot split evenly.
    """
    check_tensor_parallel(model.config, mesh.size())
    share = Share(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    splits = split_parameters(model, mesh.size())
    for name, parameter in list(model.named_parameters()):
        placement: Placement = Shard(splits[name]) if name in splits else Replicate()
        _distribute(model, name, parameter, mesh, placement)
    join_shares(model, share, sequence_parallel)
    logger.info(
        "tensor parallelism over %d ranks, residual stream %s",
        mesh.size(),
        "split by tokens (sequence parallel)" if sequence_parallel else "whole on every rank",
    )


def join_shares(model: LT2, share: Share, sequence_parallel: bool) -> None:
    """Let the modules of ``model``, which have a share of their parameters, exchange what they need."""
    ready = partial(gather_tokens if sequence_parallel else to_shares, share=share)
    done = partial(_scatter, share=share) if sequence_parallel else partial(sum_shares, share=share)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.sees_all_tokens = not sequence_parallel
            _at_end(module, ready)
    _at_end(model.embedding, done)
    for block in model.core.blocks:
        block.mixer.share = share
        _at_end(block.mixer, done)
        _at_end(block.ffn, done)
    model.core.sees_all_tokens = not sequence_parallel


def split_parameters(model: LT2, n_ranks: int) -> dict[str, int]:
    """Names of the parameters that ranks split, and the dimension."""
    splits = {"embedding.weight": 0, "head.weight": 0}
    for i, block in enumerate(model.core.blocks):
        prefix = f"core.blocks.{i}"
        splits |= {f"{prefix}.ffn.{name}.weight": 0 for name in ("gate_proj", "up_proj")}
        splits[f"{prefix}.ffn.down_proj.weight"] = 1
        splits |= {f"{prefix}.mixer.{name}": dim for name, dim in block.mixer.split_parameters(n_ranks).items()}
    return splits


def _distribute(model: LT2, name: str, parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> None:
    owner, _, leaf = name.rpartition(".")
    # src_data_rank=None: on meta there is nothing to send.
    laid_out = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(laid_out))


def _at_end(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let ``module`` return ``change`` of its output, the first of them if it has several."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module.register_forward_hook(hook)


def _scatter(x: Tensor, share: Share) -> Tensor:
    if x.shape[1] % share.n_ranks:
        raise ValueError(
            f"{x.shape[1]} tokens cannot be split over {share.n_ranks} ranks: use rows (packed: batches) of a multiple "
            f"of {share.n_ranks} tokens, or parallelism.sequence_parallel = false"
        )
    return sum_and_split_tokens(x, share)
