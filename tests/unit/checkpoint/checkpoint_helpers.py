"""A small model whose training depends on weights, optimizer state and random numbers alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lt2titan.checkpoint.config import CheckpointConfig
from lt2titan.checkpoint.manager import CheckpointManager

CONFIG_TEXT = "[model]\nn_layers = 2 # é\n"


class Net(nn.Module):
    """Tied in and out weights (one parameter), a gain, a persistent and a transient buffer, dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.rho = nn.Parameter(torch.zeros(4, width))
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("scratch", torch.rand(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding[ids] * self.scale
        for t in range(4):
            x = self.rho[t] * x + sum(torch.tanh(block(x)) for block in self.blocks)
            x = nn.functional.dropout(x, 0.1)
        return x @ self.embedding.T


def build(seed: int, lr: float = 1e-2) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    decayed = [p for name, p in model.named_parameters() if name != "rho"]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [model.rho], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses of ``steps`` steps on batches drawn from torch's global generator."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 16, (4, 5))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def manager_of(folder: Path, **options: object) -> CheckpointManager:
    config = CheckpointConfig(**options)  # type: ignore[arg-type]
    config.validate()
    return CheckpointManager(folder / "checkpoint", config)


def save(manager: CheckpointManager, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    return manager.save(
        step,
        model=model,
        optimizer=optimizer,
        train_state={"tokens_seen": 20 * step, "loss_sum": 0.1 * step},
        data_state={"index": step, "fingerprint": "abc"},
        config_text=CONFIG_TEXT,
    )


def all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint must bring back bitwise (model and optimizer state)."""
    names = {p: n for n, p in model.named_parameters()}
    state = {f"{names[p]}/{k}": v for p, fields in optimizer.state.items() for k, v in fields.items()}
    return {name: tensor.detach().clone() for name, tensor in (model.state_dict() | state).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
