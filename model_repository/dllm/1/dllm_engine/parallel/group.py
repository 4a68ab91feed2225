"""Collective calls between the ranks of one model: sums, gathers and broadcasts."""

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
    """The ranks of one model, seen from one of them.

    Every call is a collective. On CPUs a call returns once all ranks have made it, and raises
    RuntimeError if a rank is dead or does not join within the time-out. On GPUs it returns at once
    and the device waits, without a time-out: see `abort`.
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
        # Own objects instead of torch's single default group: a process may run several engines.
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
            # By default torch ends the process when a rank is missing or the group is aborted, so
            # requests would fail without a reason.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            nccl = dist.ProcessGroupNCCL
            settings: Any = nccl.Options()
            settings._timeout = bound
            return cls(rank, size, device, nccl(store, rank, size, settings))
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = bound
        # All ranks are on this machine. By default gloo resolves the host's name, which fails in
        # many containers, and listens on an external interface.
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
        return cls(rank, size, device, dist.ProcessGroupGloo(store, rank, size, options))

    @property
    def waits(self) -> bool:
        """Whether calls wait for the other ranks, with a time-out; else the device waits."""
        return not self.device.startswith("cuda")

    def sum(self, part: Tensor) -> Tensor:
        """Sum over the ranks, in place; all ranks get the result."""
        self._process_group.allreduce([part]).wait()
        return part

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape, in rank order."""
        mine = mine.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._process_group.allgather([parts], [mine]).wait()
        return parts

    def send(self, tensors: list[Tensor]) -> None:
        """Send the tensors to all other ranks, which call `receive`."""
        self._process_group.broadcast(wire.to_bytes(tensors, self.device), 0).wait()

    def receive(self, shapes: list[wire.Shape]) -> list[Tensor]:
        """Receive the tensors that rank 0 sends."""
        buffer = torch.empty(wire.num_bytes(shapes), dtype=torch.uint8, device=self.device)
        self._process_group.broadcast(buffer, 0).wait()
        return wire.from_bytes(buffer, shapes)

    def abort(self) -> None:
        """End collectives that wait for a dead rank; the group is unusable afterwards.

        A waiting NCCL kernel would block the device for ever; gloo raises by itself.
        """
        if not self.waits:
            self._process_group.abort()


def thread_share(size: int) -> int:
    """Threads for each of `size` ranks on a CPU: an equal share of torch's threads."""
    return max(1, torch.get_num_threads() // size)
