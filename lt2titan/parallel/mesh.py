"""The device mesh: the only place that knows how processes are numbered.

Axes:
    shard: data parallel; every process sees other sequences and keeps a shard of parameters, gradients and optimizer
        state (FSDP2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lt2titan.parallel.config import ParallelismConfig


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism and the mesh that they span."""

    mesh: DeviceMesh

    @classmethod
    def build(cls, config: ParallelismConfig, device_type: str) -> ParallelDims:
        """The mesh over all processes of the initialised default group."""
        config.validate_world_size(dist.get_world_size())
        return cls(init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("shard",)))

    @property
    def dp_size(self) -> int:
        """Processes that see different data."""
        return self.mesh["shard"].size()

    @property
    def dp_rank(self) -> int:
        return self.mesh["shard"].get_local_rank()
