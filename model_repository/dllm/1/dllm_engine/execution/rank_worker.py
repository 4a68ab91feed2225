"""A rank other than 0, in a process of its own, which `parallel.Ranks` starts.

It does rank 0's forward passes with its own part of the weights, and knows no request.
"""

from __future__ import annotations

import dataclasses
import logging
import os

import torch

from dllm_engine.config import EngineConfig
from dllm_engine.errors import DllmError, EngineDead
from dllm_engine.execution.devices import import_libraries, rank_device
from dllm_engine.execution.rank_model import RankModel
from dllm_engine.models.base import ModelSpec
from dllm_engine.parallel.group import Group
from dllm_engine.parallel.ranks import RankConnection
from dllm_engine.parallel.wire import PackedObject
from dllm_engine.state.batch import StepInputs

logger = logging.getLogger("dllm_engine")

#: A rank's reply when it has started, loaded, allocated; its only other reply is a number.
READY = "ready"


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """Settings of a rank besides its `RankInfo`."""

    config: EngineConfig
    #: Split over the ranks.
    spec: ModelSpec
    stop_token_ids: tuple[int, ...]


def serve(connection: RankConnection) -> None:
    """Load this rank's part of the model, then do steps until told to stop."""
    info, task = connection.info, connection.task
    assert isinstance(task, RankConfig)
    torch.set_num_threads(info.threads)
    device = rank_device(task.config, info.rank)
    import_libraries(task.config)
    connection.reply(READY)
    group = Group.join(info.rendezvous_file, info.rank, info.size, device, info.timeout)

    def loaded() -> None:
        connection.reply(READY)
        assert connection.next() == READY  # all ranks have loaded

    model = RankModel(task.config, task.spec, task.stop_token_ids, group, loaded)
    connection.reply(model.plan.num_pages)
    num_pages = connection.next()
    assert isinstance(num_pages, int)
    model.allocate(num_pages)
    connection.reply(READY)
    while (packed := connection.next()) is not None:
        assert isinstance(packed, PackedObject)
        inputs = packed.fill(group.receive(packed.shapes))
        assert isinstance(inputs, StepInputs)
        model.candidates(inputs)
        if inputs.num_log_probs:
            rows, tokens = group.receive([(torch.int64, (inputs.num_log_probs,))] * 2)
            model.log_probs(rows, tokens, inputs.num_top)


def main(descriptor: int) -> None:
    """Serve rank 0, and tell it why if that ends with an error."""
    connection = RankConnection(descriptor)
    name = f"dllm rank {connection.info.rank}"
    logging.basicConfig(format=f"{name}: %(levelname)s %(message)s", level=logging.WARNING)
    try:
        serve(connection)
    except DllmError as error:
        connection.fail(error)
    except Exception as error:
        logger.exception("rank failed")
        connection.fail(EngineDead(f"{type(error).__name__}: {error}"))
    else:
        os._exit(0)  # no clean-up is needed, and other ranks may have exited already
    os._exit(1)
