"""Tensor parallelism as the model sees it: parameters of which this rank has a share, and sums over all shares.

Every rank of the group has other heads and channels of the same layers, and sees the same tokens. Parameters are
DTensors, so that FSDP2, the optimizer and checkpoints know them whole; computation is on plain tensors, so that kernels
and compiled graphs need not know of DTensors.

Context parallelism, whose ranks have all of every layer and other tokens, uses the same collectives: model/stretch.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


class Share(NamedTuple):
    """Which of ``n_ranks`` equal shares this rank has: of the heads (tensor parallelism), or of every row's tokens
    (context parallelism). group is the ranks' process group by name, which compiled graphs can hold; "" when there is
    one share."""

    rank: int = 0
    n_ranks: int = 1
    group: str = ""

    def of(self, n: int) -> slice:
        """This rank's share of n things, of which each rank has as many."""
        size = n // self.n_ranks
        return slice(self.rank * size, (self.rank + 1) * size)


def local(parameter: Tensor, is_summed: bool = True) -> Tensor:
    """This rank's share of a parameter, as a plain tensor; the parameter itself without tensor parallelism.

    What is whole on every rank gets a summand of its gradient, because every rank used it for heads or tokens of its
    own; the sum is taken once, when FSDP2 reduces the gradient, not in every loop. ``is_summed`` = False: every rank
    computed the same.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    gradient = [Partial() if is_summed and p.is_replicate() else p for p in parameter.placements]
    return parameter.to_local(grad_placements=gradient)


def share_of(parameter: DTensor) -> Share:
    """Which share this rank has of a parameter over tensor-parallel ranks alone, as FSDP2 leaves it when gathered."""
    mesh = parameter.device_mesh
    return Share(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)


def all_sum(x: Tensor, share: Share) -> Tensor:
    """Sum of every rank's x, which each uses for its own share: the gradients are summed too."""
    return _AllSum.apply(x, share)  # type: ignore[no-any-return]


def sum_shares(x: Tensor, share: Share) -> Tensor:
    """Sum of every rank's x, with which all go on alike: each gets the gradient as it is."""
    return _SumShares.apply(x, share)  # type: ignore[no-any-return]


def to_shares(x: Tensor, share: Share) -> Tensor:
    """x, equal on all ranks, which each uses for its own share: the gradients are summed. Inverse of `sum_shares`."""
    return _ToShares.apply(x, share)  # type: ignore[no-any-return]


def gather_tokens(x: Tensor, share: Share) -> Tensor:
    """(B, L / n, D) of each rank -> (B, L, D), which each uses for its own share: gradients are summed and split."""
    return _GatherTokens.apply(x, share)  # type: ignore[no-any-return]


def sum_and_split_tokens(x: Tensor, share: Share) -> Tensor:
    """Sum of every rank's x (B, L, D), of which each keeps (B, L / n, D). Inverse of `gather_tokens`."""
    return _SumAndSplitTokens.apply(x, share)  # type: ignore[no-any-return]


def gather_ranks(x: Tensor, share: Share) -> Tensor:
    """x of each rank -> (n, *x.shape), of which each uses what it needs: gradients are summed and sent back."""
    return _GatherTokens.apply(x.unsqueeze(0), share).unflatten(1, (share.n_ranks, -1)).squeeze(0)  # type: ignore[no-any-return]


def gather_last(x: Tensor, share: Share) -> Tensor:
    """(..., D / n) of each rank -> (..., D), with which all go on alike: each gets its part of the gradient."""
    return _GatherLast.apply(x, share)  # type: ignore[no-any-return]


def maximum(x: Tensor, share: Share) -> Tensor:
    """The greatest of every rank's x, element by element; not differentiable."""
    return _c10d.wait_tensor(_c10d.all_reduce(x.detach().contiguous(), "max", share.group))  # type: ignore[no-any-return]


# The operators that graphs and eager code have in common: a process group by name, the result a tensor of its own.
_c10d = torch.ops._c10d_functional


def _sum(x: Tensor, share: Share) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), "sum", share.group))  # type: ignore[no-any-return]


def _gather(x: Tensor, dim: int, share: Share) -> Tensor:
    # Collectives work along the first dimension; of packed rows (B is 1) the rest is views.
    parts = _c10d.wait_tensor(_c10d.all_gather_into_tensor(x.contiguous(), share.n_ranks, share.group))
    return parts.unflatten(0, (share.n_ranks, -1)).movedim(0, dim).flatten(dim, dim + 1)  # type: ignore[no-any-return]


def _sum_and_split(x: Tensor, dim: int, share: Share) -> Tensor:
    parts = x.unflatten(dim, (share.n_ranks, -1)).movedim(dim, 0).flatten(0, 1).contiguous()
    part = _c10d.reduce_scatter_tensor(parts, "sum", share.n_ranks, share.group)
    return _c10d.wait_tensor(part)  # type: ignore[no-any-return]


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return _sum(x, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(gradient, ctx.share), None


class _SumShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        return _sum(x, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _ToShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(gradient, ctx.share), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return _gather(x, 1, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum_and_split(gradient, 1, ctx.share), None


class _SumAndSplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        ctx.share = share
        return _sum_and_split(x, 1, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gather(gradient, 1, ctx.share), None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:  # type: ignore[override]
        ctx.part = share.of(x.shape[-1] * share.n_ranks)
        return _gather(x, x.dim() - 1, share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient[..., ctx.part].contiguous(), None
