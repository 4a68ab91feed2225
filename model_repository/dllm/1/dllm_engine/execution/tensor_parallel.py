"""Rank 0 of a model that is split over several ranks: the engine's own process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.execution.model_runner import ModelShard, StepInputs, import_libraries, rank_device
from dllm_engine.execution.rank_worker import READY, RankTask
from dllm_engine.memory import KVPages
from dllm_engine.memory.plan import MemoryPlan
from dllm_engine.models import DiffusionModel, ModelSpec
from dllm_engine.parallel import Group, Ranks, pack_tensors, thread_share
from dllm_engine.sampling import Candidates
from dllm_engine.watchdog import Alarm


class ModelTeam:
    """What a `ModelShard` is to the runner, for several ranks: they do every step together.

    Any error in a step leaves the ranks out of step with each other, so it ends the engine.

    Raises:
        CheckpointError, InvalidConfig: see `ModelShard`; of another rank, with its number.
        EngineDead: a rank could not be started.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> None:
        device = rank_device(config, 0)
        self._threads = torch.get_num_threads()
        share = thread_share(spec.num_ranks)
        self._ranks = Ranks(
            spec.num_ranks,
            threads=share,
            timeout=config.tensor_parallel_timeout,
            task=RankTask(config, spec, stop_token_ids),
        )
        info = self._ranks.info
        self._alarm: Alarm | None = None
        try:
            if device == "cpu":
                torch.set_num_threads(share)
            import_libraries(config)
            self._ranks.collect()
            self._group = Group.join(info.rendezvous_file, 0, info.size, device, info.timeout)
            self._ranks.on_failure(self._group.abort)
            self._shard = ModelShard(config, spec, stop_token_ids, self._group, self._loaded)
            self._allocate()
            if not self._group.waits:
                self._alarm = Alarm(info.timeout, self._late)
        except (RuntimeError, OSError) as error:
            why = self._ranks.diagnose(error)
            self.close(at_once=True)
            raise why from error
        except BaseException:
            self.close(at_once=True)
            raise

    def _loaded(self) -> None:
        """Wait until all ranks have loaded their parts: one may take much longer than a step."""
        self._ranks.collect()
        self._ranks.post(READY)

    def _allocate(self) -> None:
        """As many pages as the rank with the least memory has room for."""
        plans = [self._shard.plan.num_pages, *self._ranks.collect()]
        num_pages = min(n for n in plans if isinstance(n, int))
        self._ranks.post(num_pages)
        self._shard.allocate(num_pages)
        self._ranks.collect()

    @property
    def device(self) -> str:
        """Rank 0's."""
        return self._shard.device

    @property
    def token_budget(self) -> int:
        """Rows that one step may push through the model."""
        return self._shard.token_budget

    @property
    def block_m(self) -> int | None:
        """See `ModelShard.block_m`; the same on all."""
        return self._shard.block_m

    @property
    def plan(self) -> MemoryPlan:
        """Rank 0's, with as many pages as every rank has."""
        return self._shard.plan

    @property
    def pages(self) -> KVPages:
        """Rank 0's part of them; who holds what is the same on all."""
        return self._shard.pages

    @property
    def model(self) -> DiffusionModel:
        """Rank 0's part."""
        return self._shard.model

    def bind_thread(self) -> None:
        """See `ModelShard.bind_thread`; the other ranks have a thread each, which is bound."""
        self._shard.bind_thread()

    def candidates(self, inputs: StepInputs) -> Candidates:
        """See `ModelShard.candidates`.

        Raises:
            EngineDead: names the rank that failed.
        """
        try:
            packed, tensors = pack_tensors(inputs)
            self._ranks.post(packed)
            self._group.send(tensors)
            return self._shard.candidates(inputs)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            raise self._ranks.diagnose(error) from error

    def watched(self) -> AbstractContextManager[None]:
        """Around whatever may wait for the other ranks: if it takes too long, `check` raises."""
        return self._alarm or nullcontext()

    def _late(self) -> None:
        self._ranks.diagnose(TimeoutError("a step has not ended"))

    def check(self) -> None:
        """Raise EngineDead if a rank has failed."""
        self._ranks.check()

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Call `listener`, on any thread, when a rank fails."""
        self._ranks.on_failure(listener)

    def close(self, *, at_once: bool = False) -> None:
        """End the other ranks."""
        if self._alarm is not None:
            self._alarm.close()
        self._ranks.close(at_once=at_once)
        torch.set_num_threads(self._threads)
