"""What context parallelism costs one layer of the 1.3B model: a recurrence, and attention, over rows split over ranks.

torchrun --nproc-per-node 2 scripts/benchmark_context_parallel.py [--length 32768] [--json results.jsonl]

Every rank has length / ranks tokens of one row. Each way is checked against the whole row on one GPU, then timed: the
local part alone (what the rank would compute if rows were not split), this project's way, and where they run that of
flash-linear-attention (fla.ops.cp) and torch's ring. The slowest rank counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lt2titan.kernels.attention import attention
from lt2titan.kernels.attention.ring import ring_attention
from lt2titan.kernels.check.__main__ import limit_tuning
from lt2titan.kernels.gated_delta_rule import gated_delta_rule
from lt2titan.model.shares import Share
from lt2titan.model.stretch import Stretch, find_stretch, recur_across, with_earlier_keys

N_HEADS, KEY, VALUE, HEAD = 16, 96, 192, 128
N_TIMED = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the whole row")
    parser.add_argument(
        "--tuning-configs", type=int, default=0, help="that a kernel may choose among; 0: all (minutes)"
    )
    parser.add_argument("--json", default="", help="file to append one JSON object per case to")
    arguments = parser.parse_args()
    if arguments.tuning_configs:
        limit_tuning(arguments.tuning_configs)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    share = Share(rank, n_ranks, group.group_name)
    positions = torch.arange(arguments.length, device=device).view(n_ranks, 1, -1)[rank]
    stretch = find_stretch(positions, share, None, None)
    rows = [
        {"operator": name, "way": way, **result}
        for name, inputs, whole, ways in (_recurrence(arguments.length, stretch), _attention(arguments.length, stretch))
        for way, result in _compare(inputs, whole, ways, share).items()
    ]
    if rank == 0:
        _show(rows, arguments.length, n_ranks, arguments.json)
    dist.barrier()
    dist.destroy_process_group()


Case = tuple[str, list[Tensor], Callable[..., Tensor], dict[str, Callable[..., Tensor]]]
"""Name, inputs of the whole row, the operator on them, and ways to compute it of this rank's part."""


def _recurrence(length: int, stretch: Stretch) -> Case:
    draw = _Draw(length)
    q, k = (F.normalize(draw.normal(KEY).float(), dim=-1).bfloat16() for _ in range(2))
    decay, beta = -0.1 * draw.uniform(), draw.uniform()

    def local(*inputs: Tensor) -> Tensor:
        return gated_delta_rule(*inputs, backend="fla")[0]

    def ours(*inputs: Tensor) -> Tensor:
        return recur_across(gated_delta_rule, *inputs, stretch=stretch, cu_seqlens=None, backend="fla")

    def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        from fla.ops.cp import build_cp_context
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        bounds = torch.tensor([0, length], dtype=torch.int32)
        context = build_cp_context(bounds.to(q.device), dist.group.WORLD, cu_seqlens_cpu=bounds)
        return chunk_gated_delta_rule(q, k, v, g, beta, cp_context=context)[0]  # type: ignore[no-any-return]

    ways: dict[str, Callable[..., Tensor]] = {"local part alone": local, "across ranks": ours, "fla.ops.cp": fla}
    return "gated_delta_rule", [q, k, draw.normal(VALUE), decay, beta], local, ways


def _attention(length: int, stretch: Stretch) -> Case:
    draw = _Draw(length)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, backend="fla")

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, *with_earlier_keys(k, v, stretch), backend="fla")

    def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, stretch.share.group)

    ways: dict[str, Callable[..., Tensor]] = {"local part alone": local, "gather": gather, "ring": ring}
    return "attention", [draw.normal(HEAD) for _ in range(3)], local, ways


class _Draw:
    """Random per-token tensors of one row, the same on all ranks."""

    def __init__(self, length: int) -> None:
        self.length, self.generator = length, torch.Generator().manual_seed(0)

    def normal(self, width: int) -> Tensor:
        return torch.randn(1, self.length, N_HEADS, width, generator=self.generator).bfloat16().cuda()

    def uniform(self) -> Tensor:
        return torch.rand(1, self.length, N_HEADS, generator=self.generator).cuda()


def _compare(
    inputs: list[Tensor], whole: Callable[..., Tensor], ways: dict[str, Callable[..., Tensor]], share: Share
) -> dict[str, dict[str, float | str]]:
    length = inputs[0].shape[1]
    here = share.of(length)
    weight = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    expected = [x[:, here] for x in _outputs(whole, inputs, weight)]
    part = [x[:, here].contiguous() for x in inputs]
    results: dict[str, dict[str, float | str]] = {}
    for name, way in ways.items():
        if reason := _refusal(way, part):
            results[name] = {"error": reason}
            continue
        got = _outputs(way, part, weight[:, here])
        errors = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(got, expected, strict=True)]
        worst = float(torch.stack(errors).max())  # NaN if any is
        figures = torch.tensor([worst, *_times(way, part, weight[:, here])], device="cuda")
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        names = ("relative_error", "forward_ms", "forward_backward_ms")
        results[name] = dict(zip(names, figures.tolist(), strict=True))
    return results


def _refusal(way: Callable[..., Tensor], inputs: list[Tensor]) -> str:
    """Why ``way`` does not run, "" if it does; the same on all ranks, which would else wait for the one that failed."""
    reason = ""
    try:
        with torch.no_grad():
            way(*inputs)
        torch.cuda.synchronize()
    except Exception as error:  # whatever stops somebody else's kernels
        reason = f"{type(error).__name__}: {error}"[:200]
    reasons: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")


def _outputs(way: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and all gradients under a fixed projection."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = way(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]


def _times(way: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> tuple[float, float]:
    """Median milliseconds of (forward, forward and backward)."""

    def forward() -> None:
        with torch.no_grad():
            way(*inputs)

    return _median(forward), _median(lambda: _outputs(way, inputs, weight))


def _median(work: Callable[[], object]) -> float:
    times = []
    for i in range(N_TIMED + 3):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def _show(rows: list[dict[str, float | str]], length: int, n_ranks: int, file: str) -> None:
    device = torch.cuda.get_device_name()
    title = f"{n_ranks} x {device}, one row of {length:,} tokens, {length // n_ranks:,} on each"
    table = Table("operator", "way", "forward", "forward + backward", "error against the whole row", title=title)
    for row in rows:
        if "error" in row:
            table.add_row(str(row["operator"]), str(row["way"]), "does not run", "", str(row["error"]))
            continue
        times = (f"{row[key]:.3f} ms" for key in ("forward_ms", "forward_backward_ms"))
        table.add_row(str(row["operator"]), str(row["way"]), *times, f"{row['relative_error']:.1e}")
    Console(width=150).print(table)
    if file:
        with open(file, "a", encoding="utf-8") as out:
            for row in rows:
                common = {"device": device, "n_ranks": n_ranks, "length": length, "torch": torch.__version__}
                out.write(json.dumps({**common, **row}) + "\n")


if __name__ == "__main__":
    main()
