"""The device mesh: the only place that knows how processes are numbered.

Axes, from the outermost: neighbouring ranks differ in the last.
    replicate: data parallel; each index holds a whole model (HSDP).
    shard: data parallel; every process keeps a shard of parameters, gradients and optimizer state (FSDP2).
    context: processes that hold different stretches of the same sequences; to FSDP2 they are further shards.
    tensor: processes that hold different heads and channels of the same layers and see the same tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lt2titan.parallel.config import ParallelismConfig

logger = logging.getLogger("lt2titan")


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism and the meshes that they span.

    mesh: over which parameters lie: "shard" (shard x context), and where their degrees are above 1 "replicate" before
        it and "tensor" after it.
    context_mesh: one-dimensional, this process's context neighbours; None at degree 1.
    loss_group: processes that see different tokens (all but the tensor neighbours): sum losses and token counts there;
        None is all processes.
    """

    replicate: int
    shard: int
    context: int
    tensor: int
    mesh: DeviceMesh
    context_mesh: DeviceMesh | None
    loss_group: dist.ProcessGroup | None

    @classmethod
    def build(cls, config: ParallelismConfig, device_type: str) -> ParallelDims:
        """The mesh over all processes of the initialised default group.

        Raises:
            ConfigError: the degrees' product is not the number of processes.
        """
        world_size = dist.get_world_size()
        shard = config.shard_degree(world_size)
        replicate = config.data_parallel_replicate_degree
        context, tensor = config.context_parallel_degree, config.tensor_parallel_degree
        sizes = {"replicate": replicate, "shard": shard * context, "tensor": tensor}
        mesh = _mesh(device_type, {name: n for name, n in sizes.items() if n > 1 or name == "shard"})
        # Meshes of their own, not flattened axes of one: FSDP2 wants its axes and the tensor axis as plain slices of
        # one root, and slicing flattened axes is deprecated.
        context_mesh = loss_group = None
        if context > 1:
            parts = {"data": replicate * shard, "context": context, "tensor": tensor}
            context_mesh = _mesh(device_type, parts)["context"]
        if tensor > 1:
            loss_group = _mesh(device_type, {"loss": world_size // tensor, "tensor": tensor})["loss"].get_group()
        logger.info(
            "mesh: %d processes = replicate %d x shard %d x context %d x tensor %d",
            world_size,
            replicate,
            shard,
            context,
            tensor,
        )
        return cls(replicate, shard, context, tensor, mesh, context_mesh, loss_group)

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 takes: ("shard",), or ("replicate", "shard") for HSDP."""
        return self.mesh["replicate", "shard"] if self.replicate > 1 else self.mesh["shard"]

    @property
    def dp_size(self) -> int:
        """Processes, or groups of context and tensor neighbours, that read different samples."""
        return self.replicate * self.shard

    @property
    def dp_rank(self) -> int:
        return dist.get_rank() // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        """Which stretch of its samples this process has, of ``context``."""
        return dist.get_rank() // self.tensor % self.context


def _mesh(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
