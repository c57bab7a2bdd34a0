"""What one log record holds: the contract between the trainer, `metrics.jsonl` and every other sink.

Figures that come in families are named ``family/member``. With validation.loops there are, for each n in it:

    validation, over the whole text:
        validation_loss/loops_n nats per token of the model that runs n loops

of models with indexers (mixers/dsa.py):

    training:
        indexer_kl              KL of the indexers' softmax from the attention distribution, nats: mean over tokens,
                                layers and loops (those with gradients that choose); what the indexers learn from is
                                kl_weight times its sum over layers and loops
        grad_norm/indexer       L2 norm before clipping of the indexers' gradients, which grad_norm leaves out

and with metrics.loop_diagnostics, for t = 1..T (while training, T is that of the step: ``loops``):

    training, over all tokens of the step:
        residual_rms/loop_t     root mean square of h(t)
        relative_update/loop_t  ||h(t) - h(t-1)|| / ||h(t-1)||, Frobenius norms
        rho/loop_t              mean |rho_t|, with model.loop.residual_gate
        grad_norm/core          L2 norm before clipping of the gradients of the looped blocks and rho
        grad_norm/rest          the same of embedding, final norm and head: grad_norm^2 = core^2 + rest^2
    validation, over the first rows of the text (the last loop's exit loss is theirs, not validation_loss):
        exit_loss/loop_t        nats per token when final norm and head read h(t) (logit lens)
        first_token_mass/loop_t mean attention probability on the document's first token, see model/attention_mass.py
        selection_recall/loop_t attention probability of the chosen keys (dsa) or blocks (nsa), over the most that as
                                many can have, see model/selection.py and model/block_selection.py
        selection_overlap/loop_t share of the chosen keys or blocks that the loop before chose too, see there
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol

Value = float | int | None


@dataclass(kw_only=True, slots=True)
class TrainingRecord:
    """One logged training step; throughput figures are averages since the previous record."""

    kind: ClassVar[str] = "train"

    step: int
    loss: float  # mean cross-entropy per valid token of this step, nats
    grad_norm: float  # global L2 norm before clipping
    lr: float
    loops: int  # T of this step; the throughput figures know those of the other steps
    tokens_per_second: float  # all ranks together
    tokens_seen: int  # all ranks together, since the start of training
    mfu: float | None  # fraction of the dense bf16 peak; None where the peak is unknown
    tflops: float  # achieved model TFLOP/s per device
    memory_gib: float  # peak on the logging rank, see hardware.peak_memory_gib
    data_wait_fraction: float  # share of the time that the logging rank waited for data
    skipped_steps: int  # since the start of training
    time: float = field(default_factory=time.time)  # seconds since the epoch
    extra: dict[str, float] = field(default_factory=dict)  # further figures, written beside the others

    def values(self) -> dict[str, Value]:
        return _flatten(self)


@dataclass(kw_only=True, slots=True)
class ValidationRecord:
    """One pass over the validation data, after `step` training steps."""

    kind: ClassVar[str] = "validation"

    step: int
    validation_loss: float  # mean cross-entropy per valid token, nats
    bits_per_byte: float
    time: float = field(default_factory=time.time)
    extra: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, Value]:
        return _flatten(self)


Record = TrainingRecord | ValidationRecord


def scalars(record: Record) -> dict[str, Value]:
    """The figures of ``record`` as TensorBoard and W&B name them: those of a family stand together as
    ``family/member``, all others as ``train/<name>`` and ``validation/<name>``."""
    named = {name: value for name, value in record.values().items() if name not in ("step", "time")}
    return {name if "/" in name else f"{record.kind}/{name}": value for name, value in named.items()}


class Sink(Protocol):
    """A place that records go to."""

    def write(self, record: Record) -> None: ...

    def close(self, failed: bool) -> None:
        """Write what is pending; ``failed`` says that the run ends with an error."""


def _flatten(record: Record) -> dict[str, Value]:
    named: dict[str, Value] = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "extra"}
    clash = named.keys() & record.extra.keys()
    if clash:
        raise ValueError(f"extra metrics {sorted(clash)} have the names of fields of {type(record).__name__}")
    return named | record.extra
