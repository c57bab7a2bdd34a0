from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lt2titan.metrics.hardware import peak_flops, peak_flops_of, peak_memory_gib
from lt2titan.metrics.throughput import Throughput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_mfu_by_hand() -> None:
    # 20 steps of 4 x 4096 tokens in 27.3 s on 2 devices at 8.56 GFLOP per token:
    # 12,002.9 tokens/s, 102.745 TFLOP/s together, 51.37 each, of 989 that is 5.194 %.
    clock = Clock()
    throughput = Throughput(world_size=2, peak_flops=989e12, clock=clock)
    for _ in range(20):
        throughput.add_step(4 * 4096, flops_per_token=8.56e9)
    clock.now += 27.3
    sample = throughput.measure()
    assert sample.tokens_per_second == pytest.approx(12002.93, rel=1e-6)
    assert sample.tflops == pytest.approx(51.37254, rel=1e-6)
    assert sample.mfu == pytest.approx(0.0519439, rel=1e-5)


def test_flops_follow_a_changing_loop_count() -> None:
    clock = Clock()
    throughput = Throughput(world_size=1, peak_flops=1e12, clock=clock)
    throughput.add_step(100, flops_per_token=1e9)
    throughput.add_step(100, flops_per_token=3e9)
    clock.now += 2.0
    assert throughput.measure().mfu == pytest.approx(0.2)


def test_waits_count_and_pauses_do_not() -> None:
    clock = Clock()
    throughput = Throughput(world_size=1, peak_flops=None, clock=clock)
    with throughput.data_wait():
        clock.now += 1.0
    clock.now += 3.0
    throughput.add_step(80, flops_per_token=1.0)
    with throughput.paused():
        clock.now += 50.0
    sample = throughput.measure()
    assert (sample.tokens_per_second, sample.data_wait_fraction) == (20.0, 0.25)
    assert sample.mfu is None


def test_every_sample_starts_over() -> None:
    clock = Clock()
    throughput = Throughput(world_size=1, peak_flops=None, clock=clock)
    throughput.add_step(1000, flops_per_token=1.0)
    with throughput.data_wait():
        clock.now += 5.0
    throughput.measure()
    throughput.add_step(10, flops_per_token=1.0)
    clock.now += 2.0
    sample = throughput.measure()
    assert (sample.tokens_per_second, sample.data_wait_fraction) == (5.0, 0.0)


def test_measure_needs_a_step() -> None:
    with pytest.raises(ValueError, match="add_step"):
        Throughput(world_size=1, peak_flops=None).measure()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI300X OAM", 1307.4),
    ],
)
def test_peak_by_device_name(name: str, tflops: float) -> None:
    assert peak_flops_of(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300A",
        "",
    ],
)
def test_no_peak_for_what_is_not_listed(name: str) -> None:
    assert peak_flops_of(name) is None


def test_cpu_has_no_peak() -> None:
    assert peak_flops("cpu") is None


def test_unknown_gpu_has_no_peak_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X900")
    with caplog.at_level(logging.WARNING, logger="lt2titan"):
        assert peak_flops("cuda:0") is None
    assert "NVIDIA X900" in caplog.text


def test_cpu_memory_is_the_peak_of_this_process() -> None:
    before = peak_memory_gib("cpu")
    code = (
        "from lt2titan.metrics.hardware import peak_memory_gib as peak\n"
        "before = peak('cpu')\n"
        "block = bytearray(b'x') * (256 << 20)\n"
        "held = peak('cpu')\n"
        "del block\n"
        "print(before, held, peak('cpu'))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    start, held, after = map(float, out.split())
    assert held - start == pytest.approx(0.25, abs=0.02)
    assert after == pytest.approx(held, abs=0.02)  # a peak stays
    assert peak_memory_gib("cpu") - before < 0.1  # another process's memory is not ours
