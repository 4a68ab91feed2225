"""Runs steps of a model that is split over several ranks; this process is rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dllm_engine.config import EngineConfig
from dllm_engine.execution.devices import import_libraries, rank_device, with_fitting_dtype
from dllm_engine.execution.rank_model import RankModel
from dllm_engine.execution.rank_worker import READY, RankConfig
from dllm_engine.execution.runner import ModelRunner
from dllm_engine.models.base import ModelSpec
from dllm_engine.parallel.group import Group, thread_share
from dllm_engine.parallel.ranks import Ranks
from dllm_engine.parallel.wire import pack_tensors
from dllm_engine.sampling.log_probs import TokenLogProbs
from dllm_engine.sampling.rows import Candidates
from dllm_engine.state.batch import StepInputs
from dllm_engine.structured.best_text import Span
from dllm_engine.watchdog import Watchdog


def load_runner(
    config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
) -> ModelRunner:
    """Load the model, on as many ranks as `spec` is split over."""
    runner = TensorParallelRunner if spec.num_ranks > 1 else ModelRunner
    return runner(with_fitting_dtype(config, spec), spec, stop_token_ids)


class TensorParallelRunner(ModelRunner):
    """Runs steps on several ranks, which do every step together.

    An error in a step leaves the ranks out of sync, so it ends the engine.

    Raises:
        CheckpointError, InvalidConfig: see `ModelRunner`; names the rank if it is another.
        EngineDead: a rank could not be started.
    """

    def _load(
        self, config: EngineConfig, spec: ModelSpec, stop_token_ids: tuple[int, ...]
    ) -> RankModel:
        device = rank_device(config, 0)
        self._threads = torch.get_num_threads()
        share = thread_share(spec.num_ranks)
        self._ranks = Ranks(
            spec.num_ranks,
            threads=share,
            timeout=config.tensor_parallel_timeout,
            task=RankConfig(config, spec, stop_token_ids),
        )
        info = self._ranks.info
        try:
            if device == "cpu":
                torch.set_num_threads(share)
            import_libraries(config)
            self._ranks.collect()
            self._group = Group.join(info.rendezvous_file, 0, info.size, device, info.timeout)
            self._ranks.on_failure(self._group.abort)
            model = RankModel(config, spec, stop_token_ids, self._group, self._wait_for_loading)
            self._allocate(model)
        except (RuntimeError, OSError) as error:
            why = self._ranks.diagnose(error)
            self._close(at_once=True)
            raise why from error
        except BaseException:
            self._close(at_once=True)
            raise
        #: A device would wait for other ranks for ever; `check` raises after a time-out.
        self._watchdog = Watchdog(0.0 if self._group.waits else info.timeout, self._on_timeout)
        return model

    def _wait_for_loading(self) -> None:
        """Wait until all ranks have loaded their parts: one may take much longer than a step."""
        self._ranks.collect()
        self._ranks.post(READY)

    def _allocate(self, model: RankModel) -> None:
        """Allocate as many pages as the rank with the least memory has room for."""
        plans = [model.plan.num_pages, *self._ranks.collect()]
        num_pages = min(n for n in plans if isinstance(n, int))
        self._ranks.post(num_pages)
        model.allocate(num_pages)
        self._ranks.collect()

    def _candidates(self, inputs: StepInputs, spans: Sequence[Span]) -> Candidates:
        """See `RankModel.candidates`.

        Raises:
            EngineDead: names the rank that failed.
        """
        try:
            packed, tensors = pack_tensors(inputs)
            self._ranks.post(packed)
            self._group.send(tensors)
            return self.rank.candidates(inputs, spans)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            raise self._ranks.diagnose(error) from error

    def _log_probs(self, rows: Tensor, tokens: Tensor, num_top: int) -> TokenLogProbs:
        """See `RankModel.log_probs`.

        Raises:
            EngineDead: names the rank that failed.
        """
        try:
            self._group.send([rows, tokens])
            return self.rank.log_probs(rows, tokens, num_top)
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            raise self._ranks.diagnose(error) from error

    def _on_timeout(self) -> None:
        self._ranks.diagnose(TimeoutError("a step has not ended"))

    def check(self) -> None:
        """See `ModelRunner.check`."""
        self._ranks.check()

    def on_failure(self, listener: Callable[[], None]) -> None:
        """See `ModelRunner.on_failure`."""
        self._ranks.on_failure(listener)

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._watchdog.close()
        self._close(at_once=False)

    def _close(self, *, at_once: bool) -> None:
        self._ranks.close(at_once=at_once)
        torch.set_num_threads(self._threads)
