"""Who is whose neighbour, seen from every rank of layouts too large for real processes; and degrees that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from lt2titan.config.section import ConfigError
from lt2titan.parallel.config import ParallelismConfig
from lt2titan.parallel.mesh import ParallelDims


@contextmanager
def dims_of(rank: int, world_size: int, **degrees: int) -> Iterator[ParallelDims]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield ParallelDims.build(ParallelismConfig(**degrees), "cpu")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", range(16))
def test_four_axes(rank: int) -> None:
    """Rank = ((replicate x 2 + shard) x 2 + context) x 2 + tensor."""
    replicate, shard, context, tensor = (rank >> 3) & 1, (rank >> 2) & 1, (rank >> 1) & 1, rank & 1
    with dims_of(
        rank, 16, data_parallel_replicate_degree=2, context_parallel_degree=2, tensor_parallel_degree=2
    ) as dims:
        assert (dims.replicate, dims.shard, dims.context, dims.tensor) == (2, 2, 2, 2)
        assert (dims.dp_size, dims.dp_rank) == (4, 2 * replicate + shard)
        assert dims.mesh.mesh_dim_names == ("replicate", "shard", "tensor")
        assert dims.fsdp_mesh.mesh_dim_names == ("replicate", "shard")
        assert dims.mesh["shard"].mesh.tolist() == [8 * replicate + 2 * i + tensor for i in range(4)]
        assert dims.mesh["tensor"].mesh.tolist() == [rank - tensor, rank - tensor + 1]
        assert dims.mesh["replicate"].mesh.tolist() == [rank & 7, (rank & 7) + 8]
        assert dims.context_mesh is not None
        assert dims.context_mesh.mesh.tolist() == [rank - 2 * context, rank - 2 * context + 2]
        assert dims.loss_group is not None
        assert dist.get_process_group_ranks(dims.loss_group) == list(range(tensor, 16, 2))


def test_shards_alone() -> None:
    with dims_of(5, 8) as dims:
        assert dims.mesh.mesh_dim_names == ("shard",)
        assert (dims.dp_size, dims.dp_rank, dims.context_mesh) == (8, 5, None)
        assert dims.loss_group is None


def test_replicas_see_different_data() -> None:
    with dims_of(5, 8, data_parallel_replicate_degree=4) as dims:
        assert (dims.shard, dims.dp_size, dims.dp_rank) == (2, 8, 5)
        assert dims.fsdp_mesh.shape == (4, 2)


@pytest.mark.parametrize(
    ("degrees", "key", "says"),
    [
        ({"data_parallel_shard_degree": 3}, "data_parallel_shard_degree", ["8 processes", "-1 or 8"]),
        ({"data_parallel_shard_degree": 2}, "data_parallel_shard_degree", ["data_parallel_replicate_degree = 4"]),
        (
            {"data_parallel_shard_degree": 8, "data_parallel_replicate_degree": 2},
            "data_parallel_shard_degree",
            ["8 processes", "-1 or 4"],
        ),
        ({"data_parallel_replicate_degree": 3}, "data_parallel_replicate_degree", ["8 processes", "3"]),
        ({"data_parallel_replicate_degree": 16}, "data_parallel_replicate_degree", ["8 processes", "16"]),
        (
            {"data_parallel_replicate_degree": 2, "tensor_parallel_degree": 3},
            "tensor_parallel_degree",
            ["8 processes", "data_parallel_replicate_degree 2 x tensor_parallel_degree 3 = 6"],
        ),
        ({"context_parallel_degree": 3}, "context_parallel_degree", ["8 processes", "context_parallel_degree 3 = 3"]),
        (
            {"context_parallel_degree": 8, "tensor_parallel_degree": 2},
            "context_parallel_degree",
            ["8 processes", "context_parallel_degree 8 x tensor_parallel_degree 2 = 16"],
        ),
        (
            {"context_parallel_degree": 2, "data_parallel_shard_degree": 8},
            "data_parallel_shard_degree",
            ["8 processes", "2 of them in each shard's place", "-1 or 4"],
        ),
    ],
)
def test_degrees_that_do_not_fit(degrees: dict[str, int], key: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelismConfig(**degrees).validate_world_size(8)
    assert caught.value.key == key
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_the_rest_is_sharded() -> None:
    config = ParallelismConfig(data_parallel_replicate_degree=2, tensor_parallel_degree=4)
    assert (config.shard_degree(64), config.data_parallel_size(64)) == (8, 16)


@pytest.mark.parametrize("axis", ["data_parallel_replicate", "tensor_parallel", "context_parallel"])
def test_no_degree_is_zero(axis: str) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        ParallelismConfig(**{f"{axis}_degree": 0}).validate()
