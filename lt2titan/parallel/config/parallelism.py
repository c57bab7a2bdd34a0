"""``[parallelism]``: how the model lies on devices. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lt2titan.config.section import ConfigError, require


@dataclass(kw_only=True, slots=True)
class ParallelismConfig:
    """Degrees of parallelism, whose product is the number of processes, and how FSDP2 treats the loops."""

    data_parallel_replicate_degree: int = 1
    """Groups of processes that each hold the whole model, sharded among themselves; more than 1 is HSDP: gradients are
    reduced inside a group, then over groups."""
    data_parallel_shard_degree: int = -1
    """Processes over which parameters, gradients and optimizer state are sharded (FSDP2); -1 means all that the other
    degrees leave."""
    tensor_parallel_degree: int = 1
    """Processes that split the heads, channels and vocabulary of every layer among them and see the same tokens."""
    sequence_parallel: bool = True
    """With tensor parallelism, split the residual stream between layers by tokens: less memory, as much communication.
    Off, rows may have any length."""
    context_parallel_degree: int = 1
    """Processes that split every row of tokens among them, for rows too long for one: each has a contiguous stretch.
    Must divide training.seq_len and validation.seq_len."""
    context_parallel_attention: Literal["gather", "ring"] = "gather"
    """How softmax layers reach the keys of other ranks. gather: all of them at once. ring: one rank's after the other,
    never more than two in memory while training; on GPUs in bfloat16, for full attention over dense rows (no window, no
    data.document_mask)."""
    pipeline_parallel_degree: int = 1
    """Only 1: a looped stack visits every stage once per loop, so a pipeline would idle for most of each step."""
    expert_parallel_degree: int = 1
    """Only 1: LT2 models have no experts."""
    fsdp_loop_reshard: Literal["auto", "per_step", "per_pass", "per_visit"] = "auto"
    """How long a block's gathered parameters are kept. per_step: one all-gather per block and optimizer step, whatever
    the loops and the accumulation. per_pass: let go before each backward pass and gathered once for it. per_visit:
    gathered in every loop, forward and backward (reshard_after_forward = true). auto: the first that fits in memory."""
    fsdp_defer_reductions: Literal["auto", "on", "off"] = "auto"
    """Reduce gradients over processes once per optimizer step, not per microbatch, which keeps whole gradients in
    float32 (4 bytes per parameter) meanwhile. auto: where that fits in memory."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory and step the optimizer there: slow, for
    models that do not fit otherwise."""

    def validate(self) -> None:
        shard = self.data_parallel_shard_degree
        require(shard == -1 or shard > 0, self, "data_parallel_shard_degree", "must be positive, or -1 for the rest")
        for name in ("data_parallel_replicate_degree", "tensor_parallel_degree", "context_parallel_degree"):
            require(getattr(self, name) > 0, self, name, "must be positive")
        reasons = {
            "pipeline_parallel_degree": "refused: the looped stack passes through every stage n_loops times per "
            "token, so stages would wait for each other; set it to 1 and shard with FSDP2",
            "expert_parallel_degree": "refused: LT2 models have no experts to distribute; set it to 1",
        }
        for name, reason in reasons.items():
            require(getattr(self, name) == 1, self, name, reason)

    def validate_world_size(self, world_size: int) -> None:
        """Refuse degrees whose product is not the number of processes."""
        self.shard_degree(world_size)

    def shard_degree(self, world_size: int) -> int:
        """The shard degree on ``world_size`` processes, -1 resolved.

        Raises:
            ConfigError: the degrees' product is not ``world_size``.
        """
        replicate, shard = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        others = {
            "data_parallel_replicate_degree": replicate,
            "context_parallel_degree": self.context_parallel_degree,
            "tensor_parallel_degree": self.tensor_parallel_degree,
        }
        product = replicate * self.context_parallel_degree * self.tensor_parallel_degree
        rest, remainder = divmod(world_size, product)
        there_are = f"there are {world_size} processes (NGPU x nodes)"
        if remainder or not rest:
            factors = " x ".join(f"{name} {degree}" for name, degree in others.items() if degree > 1)
            name = max(others, key=lambda name: others[name])
            raise ConfigError(name, others[name], f"{there_are}, no multiple of {factors} = {product}; change either")
        if shard not in (-1, rest):
            beside = f", {product} of them in each shard's place" if product > 1 else ""
            use = f"use -1 or {rest}"
            if rest % shard == 0:
                use += f", or data_parallel_replicate_degree = {replicate * rest // shard} for more replicas of it"
            raise ConfigError("data_parallel_shard_degree", shard, f"{there_are}{beside}; {use}")
        return rest

    def data_parallel_size(self, world_size: int) -> int:
        """Processes that read different samples, of ``world_size``: replicate x shard."""
        return self.data_parallel_replicate_degree * self.shard_degree(world_size)
