"""The sections of parallel/: how the model lies on devices and what it keeps there. Imports without torch."""

from lt2titan.parallel.config.activation_checkpoint import ActivationCheckpointConfig
from lt2titan.parallel.config.comm import CommConfig
from lt2titan.parallel.config.compile import CompileConfig
from lt2titan.parallel.config.float8 import Float8Config
from lt2titan.parallel.config.parallelism import ParallelismConfig

__all__ = ["ActivationCheckpointConfig", "CommConfig", "CompileConfig", "Float8Config", "ParallelismConfig"]
