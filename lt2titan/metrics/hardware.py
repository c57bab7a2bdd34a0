"""What the device can do at best, and how much memory the run took."""

from __future__ import annotations

import logging
import os
import re
import resource
import sys

import torch

logger = logging.getLogger("lt2titan")

# Dense bf16 (fp32 accumulation) peak in TFLOP/s. Data sheets that state a figure "with sparsity" are halved.
# Patterns match the whole device name without its vendor: variants of one chip differ by a quarter, and a MIG
# slice ("... MIG 1g.10gb") or a laptop part is not the full device. What is not listed has no peak.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    # A100 / A800 data sheets: 312 for SXM and PCIe, 40 and 80 GB.
    (r"A[18]00([- ]SXM4)?([- ]PCI[eE])?[- ](40|80)GB( PCIe)?", 312.0),
    (r"A30", 165.0),  # A30 data sheet
    (r"A40", 149.7),  # A40 data sheet
    (r"A10", 125.0),  # A10 data sheet (not A10G)
    (r"RTX A6000", 154.8),  # GA102 white paper
    # H100 data sheet: 1,979 / 1,513 / 1,671 with sparsity for SXM / PCIe / NVL; the SXM name ends in HBM3.
    (r"H100 (80|96)GB HBM3", 989.0),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.0),
    (r"H800", 989.0),  # H800 SXM: H100's compute, slower links
    (r"H800 PCIe", 756.0),
    (r"H200", 989.0),  # H200 data sheet: 1,979 with sparsity (SXM)
    (r"H200 NVL", 835.0),  # same: 1,671 with sparsity
    (r"GH200 \d+GB?( HBM3e?)?", 989.0),  # GH200 data sheet: 1,979 with sparsity
    (r"H20(-3e)?", 148.0),  # H20 data sheet
    # Blackwell brief, per GPU with sparsity: 4.5 PFLOP/s in HGX B200 / B300, 5 in GB200 / GB300 NVL72.
    (r"B[23]00( SXM6 AC)?", 2250.0),
    (r"GB[23]00", 2500.0),
    (r"L4", 121.0),  # L4 data sheet: 242 with sparsity
    (r"L20", 119.5),  # L20 data sheet
    (r"L40", 181.05),  # L40 data sheet
    (r"L40S", 362.05),  # L40S data sheet
    (r"RTX 6000 Ada Generation", 364.2),  # Ada white paper
    # GeForce tensor cores halve their rate with fp32 accumulation: GA102, Ada and RTX Blackwell white papers.
    (r"GeForce RTX 3090", 71.2),
    (r"GeForce RTX 4090", 165.2),
    (r"GeForce RTX 5090", 209.5),
    # AMD Instinct data sheets; an MI250X is seen as two devices (GCDs) of half its 383 TFLOP/s.
    (r"Instinct MI210", 181.0),
    (r"Instinct MI250X", 191.5),
    (r"Instinct MI300X.*", 1307.4),
    (r"Instinct MI325X.*", 1307.4),
    (r"Instinct MI355X.*", 2516.6),
)


def peak_flops_of(name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name in torch.cuda.get_device_name; None if unknown."""
    model = re.sub(r"^(NVIDIA|AMD)\s+", "", name.strip())
    for pattern, tflops in _PEAK_TFLOPS:
        if re.fullmatch(pattern, model):
            return tflops * 1e12
    return None


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 peak of ``device`` in FLOP/s; None if unknown and on CPU (no MFU beats a wrong one)."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_flops_of(name)
    if peak is None:
        logger.warning("no bf16 peak is known for %r: mfu is null (add it to lt2titan/metrics/hardware.py)", name)
    else:
        logger.info("%s: MFU is a fraction of its dense bf16 peak, %.0f TFLOP/s", name, peak / 1e12)
    return peak


def device_memory(device: torch.device) -> int:
    """Bytes that a process can use: a GPU's memory, or of a host's its share among the node's processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB.

    CUDA: the most bytes that torch had allocated at once since the previous call, which starts a new peak.
    CPU: the largest resident set of this process (not of data workers) since it started; it never falls.
    """
    device = torch.device(device)
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        num_bytes = _peak_resident_bytes()
    return num_bytes / 2**30


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        # Not getrusage: its peak survives exec, so a process starts with the size of its launcher.
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere
