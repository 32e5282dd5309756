"""Peak memory of each phase of an update."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Consecutive phases and the peak memory of each.

    On a GPU the memory allocated to tensors; on a Linux CPU the resident memory of the whole process, libraries included. On
    other systems nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._measured = self._on_gpu or CLEAR.exists()
        self._phase: str | None = None
        self._peaks: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the current phase and begin another. If a phase occurs several times, its peak is the largest."""
        if not self._measured:
            return
        self._end()
        self._phase = phase
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            CLEAR.write_text("5")  # resets the kernel's peak, VmHWM, to the current resident memory

    def peaks(self) -> dict[str, float]:
        """{memory/PHASE: MiB} since the last call."""
        self._end()
        found, self._peaks, self._phase = self._peaks, {}, None
        return found

    def _end(self) -> None:
        if self._phase is None:
            return
        key = f"memory/{self._phase}"
        self._peaks[key] = max(self._peaks.get(key, 0.0), self._now())

    def _now(self) -> float:
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._device) / MIB
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
