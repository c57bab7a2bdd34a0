"""``[parallelism]``: how the model lies on devices. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass

from lt2titan.config.section import ConfigError, require


@dataclass(kw_only=True, slots=True)
class ParallelismConfig:
    """Degrees of parallelism; their product is the number of processes."""

    data_parallel_shard_degree: int = -1
    """Processes over which parameters, gradients and optimizer state are sharded (FSDP2); -1 means all of them."""
    tensor_parallel_degree: int = 1
    """Only 1: tensor parallelism is not available yet."""
    context_parallel_degree: int = 1
    """Only 1: context parallelism is not available yet."""
    pipeline_parallel_degree: int = 1
    """Only 1: a looped stack visits every stage once per loop, so a pipeline would idle for most of each step."""
    expert_parallel_degree: int = 1
    """Only 1: LT2 models have no experts."""

    def validate(self) -> None:
        shard = self.data_parallel_shard_degree
        require(shard == -1 or shard > 0, self, "data_parallel_shard_degree", "must be positive, or -1 for all")
        reasons = {
            "tensor_parallel_degree": "tensor parallelism is not available yet; set it to 1 and shard with FSDP2 "
            "(parallelism.data_parallel_shard_degree)",
            "context_parallel_degree": "context parallelism is not available yet; set it to 1",
            "pipeline_parallel_degree": "refused: the looped stack passes through every stage n_loops times per "
            "token, so stages would wait for each other; set it to 1 and shard with FSDP2",
            "expert_parallel_degree": "refused: LT2 models have no experts to distribute; set it to 1",
        }
        for name, reason in reasons.items():
            require(getattr(self, name) == 1, self, name, reason)

    def validate_world_size(self, world_size: int) -> None:
        """Refuse degrees whose product is not the number of processes."""
        shard = self.data_parallel_shard_degree
        if shard not in (-1, world_size):
            reason = f"there are {world_size} processes (NGPU x nodes); use -1 or {world_size}"
            raise ConfigError("data_parallel_shard_degree", shard, reason)
