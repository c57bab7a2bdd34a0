"""The whole configuration of a run: each component's own section, gathered, and the checks between sections.

Few may import this (CONTRIBUTING.md); components take their own section or plain values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from lt2titan.checkpoint.config import CheckpointConfig
from lt2titan.config.section import ConfigError
from lt2titan.config.training import DebugConfig, JobSection, TrainingConfig
from lt2titan.data.check import check_texts, validation_text
from lt2titan.data.config import DataConfig, vocabulary_size
from lt2titan.evaluation.config import ValidationConfig
from lt2titan.kernels.config import KernelsConfig
from lt2titan.metrics.config import MetricsConfig, ProfilingConfig
from lt2titan.model.config import ModelConfig
from lt2titan.optim.config import LRSchedulerConfig, OptimizerConfig
from lt2titan.parallel.config import (
    ActivationCheckpointConfig,
    CommConfig,
    CompileConfig,
    Float8Config,
    ParallelismConfig,
)
from lt2titan.parallel.config.context_parallel import check_context_parallel, check_ring
from lt2titan.parallel.config.tensor_parallel import check_tensor_parallel


@dataclass(kw_only=True, slots=True)
class JobConfig:
    """Train a looped language model. Every field can stand in the TOML file and on the command line."""

    job: JobSection = field(default_factory=JobSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    float8: Float8Config = field(default_factory=Float8Config)
    comm: CommConfig = field(default_factory=CommConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def sections(self) -> Iterator[tuple[str, Any]]:
        for section in fields(self):
            yield section.name, getattr(self, section.name)

    def validate(self) -> None:
        """Let every section refuse its own values; the error names the whole key."""
        for name, section in self.sections():
            with _named(name):
                section.validate()

    def validate_run(self, world_size: int) -> None:
        """Refuse what each section allows but the run as a whole, on ``world_size`` processes, does not."""
        self.validate_layout(world_size)
        if self.comm.mode == "fake_backend":  # reads no data
            return
        training = (self.training.dataset, self.training.dataset_path)
        validation = validation_text(training, self.validation.dataset, self.validation.dataset_path)
        check_texts(self.data, training, validation if self.validation.enable else None)
        if self.training.dataset == "synthetic":
            return
        n_tokens = vocabulary_size(self.data)
        if n_tokens > self.model.vocab_size:
            reason = f"the tokenizer {self.data.tokenizer!r} has {n_tokens} tokens; use at least that many"
            raise ConfigError("model.vocab_size", self.model.vocab_size, reason)

    def validate_layout(self, world_size: int) -> None:
        """The part of `validate_run` that asks for no data: how the model and its batches lie on the processes."""
        with _named("parallelism"):
            self.parallelism.validate_world_size(world_size)
            check_tensor_parallel(self.model, self.parallelism.tensor_parallel_degree)
            check_context_parallel(self.model, self._lengths(), self.parallelism.context_parallel_degree)
            if self.parallelism.context_parallel_attention == "ring":
                check_ring(
                    self.model,
                    self.parallelism.context_parallel_degree,
                    self.data.document_mask,
                    self.training.mixed_precision_param,
                )
            if self.parallelism.tensor_parallel_degree > 1 and self.parallelism.sequence_parallel:
                self._check_sequence_parallel()
        with _named("training"):
            self.training.microbatches(self.parallelism.data_parallel_size(world_size))
        with _named("activation_checkpoint"):
            self.activation_checkpoint.validate_model(self.model.n_loops, is_compiled=self.compile.enable)
        with _named("validation"):
            self.validation.validate_model(self.model.n_loops)

    def _check_sequence_parallel(self) -> None:
        """Refuse rows that tensor-parallel ranks cannot split by tokens."""
        tensor, context = self.parallelism.tensor_parallel_degree, self.parallelism.context_parallel_degree
        parts = f"tensor_parallel_degree {tensor}"
        if context > 1:
            parts += f" x context_parallel_degree {context} = {tensor * context}"
        for name, length in self._lengths().items():
            if length % (tensor * context):
                reason = f"{name} = {length} is no multiple of {parts}; change either, or set this to false"
                raise ConfigError("sequence_parallel", True, reason)

    def _lengths(self) -> dict[str, int]:
        """Tokens of rows, by the key that sets them."""
        lengths = {"training.seq_len": self.training.seq_len}
        if self.validation.enable and self.validation.seq_len:
            lengths["validation.seq_len"] = self.validation.seq_len
        return lengths

    @property
    def schedule(self) -> tuple[int, int]:
        """(warm-up steps, horizon) of the learning rate, the warm-up no longer than the horizon."""
        horizon = self.lr_scheduler.total_steps or self.training.steps
        return min(self.lr_scheduler.warmup_steps, horizon), horizon

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant."""
        warnings = []
        warmup, horizon = self.schedule
        if warmup < self.lr_scheduler.warmup_steps:
            warnings.append(
                f"lr_scheduler.warmup_steps = {self.lr_scheduler.warmup_steps} is longer than the schedule's horizon; "
                f"shortened to {horizon}"
            )
        loop = self.model.loop
        if loop.schedule == "grow" and loop.grow_steps >= horizon:
            warnings.append(
                f"model.loop.grow_steps = {loop.grow_steps} is no shorter than the schedule's horizon of {horizon} "
                f"steps: model.n_loops = {self.model.n_loops} loops are never trained"
            )
        if self.model.hybrid.mixer == self.model.mixer:
            warnings.append(
                f"model.hybrid.mixer = {self.model.mixer!r} is the common mixer too: the stack is no hybrid"
            )
        return warnings


class _named:
    """Put a section's name before the key of a ConfigError that its code raises."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ConfigError):
            error.key = f"{self.prefix}.{error.key}"
