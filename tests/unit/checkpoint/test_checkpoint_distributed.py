"""Two processes (gloo, FSDP2) against one: layouts may change between save and load, bit for bit."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint_helpers import CONFIG_TEXT, all_tensors, assert_same, build, manager_of, save, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lt2titan.checkpoint.convert import read_model_state
from lt2titan.checkpoint.folders import list_steps
from lt2titan.checkpoint.manager import CheckpointManager
from lt2titan.checkpoint.storage import CheckpointError, CheckpointWriteError

N_RANKS = 2


def build_sharded(seed: int):
    model, _ = build(seed)
    mesh = init_device_mesh("cpu", (N_RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def full_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    tensors = all_tensors(model, optimizer)
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for k, t in tensors.items()}


def save_streaming(manager: CheckpointManager, step: int, model, optimizer) -> Path:
    """As a streaming source does it: every rank has a position of its own."""
    rank = dist.get_rank()
    return manager.save(
        step,
        model=model,
        optimizer=optimizer,
        train_state={"tokens_seen": 20 * step},
        data_state={"offset": 100 + rank},
        data_shard=(rank, N_RANKS),
        config_text=CONFIG_TEXT,
    )


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=N_RANKS)
    one_to_two(rank, folder)
    two_to_two(rank, folder)
    errors_reach_all_ranks(rank, folder)
    going_back(folder)
    dist.barrier()
    os._exit(0)  # as lt2titan.train leaves: tearing down races with gloo's threads


def one_to_two(rank: int, folder: Path) -> None:
    """What one process saved, two load, bitwise; random states exist for the first rank only."""
    model, optimizer = build_sharded(seed=10)
    torch.manual_seed(1000 + rank)
    before = torch.get_rng_state()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("lt2titan").addHandler(handler)
    loaded = manager_of(folder / "one").restore(model=model, optimizer=optimizer)
    logging.getLogger("lt2titan").removeHandler(handler)
    assert any("ranks from 1 on did not exist" in record.getMessage() for record in records) == (rank == 0)
    assert loaded.step == 2
    assert loaded.data_state == {"index": 2, "fingerprint": "abc"}
    assert_same(full_tensors(model, optimizer), torch.load(folder / "one.pt"))
    assert torch.equal(torch.get_rng_state(), before) == (rank == 1)


def two_to_two(rank: int, folder: Path) -> None:
    """A straight run equals save, then resume in fresh objects: losses on every rank, weights, optimizer."""
    model, optimizer = build_sharded(seed=0)
    torch.manual_seed(2000 + rank)
    train(model, optimizer, 3)
    manager = manager_of(folder / "two")
    save_streaming(manager, 3, model, optimizer)
    save(manager_of(folder / "indexed"), 3, model, optimizer)
    saved = full_tensors(model, optimizer)
    straight = train(model, optimizer, 2)
    expected = full_tensors(model, optimizer)

    model, optimizer = build_sharded(seed=11)  # never stepped
    loaded = manager.restore(model=model, optimizer=optimizer, data_shard=(rank, N_RANKS))
    assert loaded.data_state == {"offset": 100 + rank}
    assert_same(full_tensors(model, optimizer), saved)
    assert train(model, optimizer, 2) == straight
    assert_same(full_tensors(model, optimizer), expected)
    if rank == 0:
        torch.save(saved, folder / "saved.pt")


def errors_reach_all_ranks(rank: int, folder: Path) -> None:
    """One rank fails, all raise the same error, nobody waits; then everything works again."""
    model, optimizer = build_sharded(seed=0)
    train(model, optimizer, 1)
    manager = manager_of(folder / "errors", keep_latest_k=1)
    save_streaming(manager, 1, model, optimizer)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    with pytest.raises(CheckpointWriteError, match=r"rank 1: .*File too large") as error:
        save_streaming(manager, 2, model, optimizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "rank 0:" not in str(error.value)
    dist.barrier()
    assert [step for step, _ in list_steps(manager.folder)] == [1]

    data_state = {"offset": (1, 2)} if rank == 1 else {"offset": 1}
    with pytest.raises(CheckpointError, match="rank 1: the data position cannot be stored"):
        manager.save(
            2,
            model=model,
            optimizer=optimizer,
            train_state={},
            data_state=data_state,
            data_shard=(rank, N_RANKS),
            config_text="",
        )
    with pytest.raises(CheckpointError, match="at data-parallel degree 2; the present source is not"):
        manager.restore(model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="load_step = 9"):
        manager_of(folder / "errors", load_step=9).restore(model=model, optimizer=optimizer)

    path = save_streaming(manager, 2, model, optimizer)
    assert manager.newest_valid() == path
    dist.barrier()
    weights = model.state_dict()["blocks.0.weight"].full_tensor().numpy().tobytes()
    if rank == 0:  # damage in rank 1's shard: found by whichever rank checks that part
        shard = path / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[content.index(weights[len(weights) // 2 :])] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"wrong checksum: model\.blocks\.0\.weight in __1_0\.distcp"):
        manager.choose_start()


def going_back(folder: Path) -> None:
    """Both ranks leave the old branch together, and find the new one together."""
    model, optimizer = build_sharded(seed=0)
    for step in (1, 2):
        train(model, optimizer, 1)
        save_streaming(manager_of(folder / "branch"), step, model, optimizer)
    place = {"data_shard": (dist.get_rank(), N_RANKS)}
    manager = manager_of(folder / "branch", load_step=1)
    assert manager.restore(model=model, optimizer=optimizer, **place).step == 1
    train(model, optimizer, 1)
    path = save_streaming(manager, 2, model, optimizer)
    expected = full_tensors(model, optimizer)
    assert sorted(p.name for p in path.parent.iterdir()) == ["abandoned-step-2", "branch.json", "step-1", "step-2"]
    model, optimizer = build_sharded(seed=12)
    assert manager_of(folder / "branch", load_step=1).restore(model=model, optimizer=optimizer, **place).step == 2
    assert_same(full_tensors(model, optimizer), expected)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything two ranks do and check, after one process has saved ``one``; they leave ``two`` and ``indexed``."""
    folder = tmp_path_factory.mktemp("ranks")
    model, _ = build(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    save(manager_of(folder / "one"), 2, model, optimizer)
    torch.save(all_tensors(model, optimizer), folder / "one.pt")
    mp.spawn(run_rank, args=(folder,), nprocs=N_RANKS, join=True)
    return folder


def test_one_process_resumes_what_two_saved(two_ranks):
    """The position of an indexed source is one integer: valid at any degree. Optimizer state follows."""
    model, _ = build(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loaded = manager_of(two_ranks / "indexed").restore(model=model, optimizer=optimizer)
    assert loaded.data_state == {"index": 3, "fingerprint": "abc"}
    assert_same(all_tensors(model, optimizer), torch.load(two_ranks / "saved.pt"))


def test_a_stream_is_not_resumed_at_another_degree_but_its_weights_load(two_ranks):
    two = manager_of(two_ranks / "two")
    assert {file.name for file in (two.folder / "step-3").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    model, optimizer = build(3)
    with pytest.raises(CheckpointError, match="Resume at degree 2"):
        two.restore(model=model, optimizer=optimizer, data_shard=(0, 1))
    assert two.load(two.folder / "step-3", model=model).step == 0
    weights, expected = dict(model.state_dict()), torch.load(two_ranks / "saved.pt")
    assert_same(weights, {name: expected[name] for name in weights})
    tensors, config_text = read_model_state(two_ranks / "two")
    assert config_text == CONFIG_TEXT
    assert_same(tensors, weights)


def test_one_process_with_a_process_group(two_ranks, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model, _ = build(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        manager_of(two_ranks / "indexed").restore(model=model, optimizer=optimizer)
        saved = all_tensors(model, optimizer)
        assert_same(saved, torch.load(two_ranks / "saved.pt"))
        save(manager_of(tmp_path), 3, model, optimizer)
        train(model, optimizer, 1)
        manager_of(tmp_path).restore(model=model, optimizer=optimizer)
        assert_same(all_tensors(model, optimizer), saved)
    finally:
        dist.destroy_process_group()
