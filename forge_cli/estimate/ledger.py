"""Which bytes are alive at each instant of a replayed training step.

A storage counts from its creation to the moment when nothing holds it any more: Python's own reference counts stand
for torch's, so code written with the same local variables as the model's has the same lifetimes.
"""

from __future__ import annotations


class Ledger:
    """Counts live bytes by part and keeps the highest point of every phase.

    Attributes:
        granule_bytes: Sizes are rounded up to a multiple of this (512 on CUDA, 1 on the CPU).
        live_bytes: What is alive now.
        parts: The same by part (``activations``, ``gradients``, ...).
        part: Part that new storages belong to.
        peaks: Phase to its highest point: (bytes, parts).
    """

    def __init__(self, granule_bytes: int) -> None:
        self.granule_bytes = granule_bytes
        self.live_bytes = 0
        self.parts: dict[str, int] = {}
        self.part = "activations"
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self._phase = ""
        self._peak = -1

    def enter(self, phase: str) -> None:
        """Begins (or goes on with) a phase."""
        if phase == self._phase:
            return
        self._phase = phase
        self._peak = self.peaks[phase][0] if phase in self.peaks else -1
        if self.live_bytes > self._peak:
            self._keep()

    def add(self, part: str, size_bytes: int) -> None:
        """Adds bytes, or takes them away if negative."""
        self.live_bytes += size_bytes
        self.parts[part] = self.parts.get(part, 0) + size_bytes
        if self.live_bytes > self._peak:
            self._keep()

    def _keep(self) -> None:
        self._peak = self.live_bytes
        self.peaks[self._phase] = (self.live_bytes, dict(self.parts))


class Storage:
    """Bytes on the device, alive as long as this object is."""

    __slots__ = ("_ledger", "_part", "size_bytes")

    def __init__(self, ledger: Ledger, size_bytes: int) -> None:
        granule = ledger.granule_bytes
        self.size_bytes = size_bytes = -(-size_bytes // granule) * granule
        self._ledger = ledger
        self._part = part = ledger.part
        # Ledger.add, written out: this runs some thousand times.
        ledger.parts[part] = ledger.parts.get(part, 0) + size_bytes
        ledger.live_bytes = live = ledger.live_bytes + size_bytes
        if live > ledger._peak:
            ledger._keep()

    def __del__(self) -> None:
        ledger = self._ledger
        ledger.parts[self._part] -= self.size_bytes
        ledger.live_bytes -= self.size_bytes
