"""What the ranks of one model say to each other in a step: sums, and statistics side by side."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dllm_engine.parallel import wire


@dataclasses.dataclass(frozen=True)
class Group:
    """The ranks of one model, as one of them sees them.

    Every call is a collective. On CPUs it returns once all ranks have made it, and raises
    RuntimeError when one of them is gone or does not come within the time-out. On GPUs it returns
    at once, and it is the device that waits, for ever if need be: see `abort`.
    """

    rank: int
    size: int
    device: str
    _process_group: Any

    @classmethod
    def join(
        cls, rendezvous_file: Path, rank: int, size: int, device: str, timeout: float
    ) -> Group:
        """Meet the other ranks through a shared file: NCCL on CUDA devices, gloo on CPUs."""
        store = dist.FileStore(str(rendezvous_file), size)  # type: ignore[attr-defined]
        bound = timedelta(seconds=timeout)
        # Objects of their own instead of torch's one default group: a process may hold several
        # engines.
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            # By default torch ends the process when a rank does not come, or is given up; then
            # nobody could tell the requests why they failed.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            nccl = dist.ProcessGroupNCCL
            settings: Any = nccl.Options()
            settings._timeout = bound
            return cls(rank, size, device, nccl(store, rank, size, settings))
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = bound
        # All ranks are on this machine; by default gloo looks the host's name up, which fails
        # in many containers, and listens to the outside.
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        return cls(rank, size, device, dist.ProcessGroupGloo(store, rank, size, options))

    @property
    def waits(self) -> bool:
        """Whether calls wait, and know of the time-out, instead of the device."""
        return not self.device.startswith("cuda")

    def sum(self, part: Tensor) -> Tensor:
        """Σ over the ranks, in place; the same on all of them."""
        self._process_group.allreduce([part]).wait()
        return part

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Everybody's tensor, all of one shape, in the order of the ranks."""
        mine = mine.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._process_group.allgather([parts], [mine]).wait()
        return parts

    def send(self, tensors: list[Tensor]) -> None:
        """Give the tensors to all ranks, which `receive` them."""
        self._process_group.broadcast(wire.to_bytes(tensors, self.device), 0).wait()

    def receive(self, shapes: list[wire.Shape]) -> list[Tensor]:
        """The tensors that rank 0 sends."""
        buffer = torch.empty(wire.num_bytes(shapes), dtype=torch.uint8, device=self.device)
        self._process_group.broadcast(buffer, 0).wait()
        return wire.from_bytes(buffer, shapes)

    def abort(self) -> None:
        """Let go of collectives that wait for a rank which is gone; the group is of no use after.

        A waiting NCCL kernel would hold the device for ever; gloo raises by itself.
        """
        if not self.waits:
            self._process_group.abort()


def thread_share(size: int) -> int:
    """Threads that each of `size` ranks on a CPU may use of those that torch would use alone."""
    return max(1, torch.get_num_threads() // size)
