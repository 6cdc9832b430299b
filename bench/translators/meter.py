"""How much of a GPU's memory torch has taken since something else is asked for."""

from __future__ import annotations

from typing import Any

from translators.server import How


class Meter:
    """Figures of one device; a CPU has none."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.how: How | None = None

    def watch(self, how: How) -> bool:
        """Begin anew if something else is asked for than before; True if so."""
        if how == self.how:
            return False
        self.how = how
        if self.device != "cpu":
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return True

    def figures(self) -> dict[str, Any]:
        if self.device == "cpu":
            return {}
        import torch

        # Reserved is also what is kept for later, such as what graphs work on.
        peaks = {
            "peak_device_mib": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_mib": torch.cuda.max_memory_reserved(self.device),
        }
        return {name: round(size / 2**20) for name, size in peaks.items()}
