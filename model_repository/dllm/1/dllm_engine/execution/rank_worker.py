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
from dllm_engine.execution.rank_model import RankModel, StepInputs
from dllm_engine.models import ModelSpec
from dllm_engine.parallel import Group, Link, Skeleton

logger = logging.getLogger("dllm_engine")

#: Answer of a rank that is there, has its pages, …; what it says of itself otherwise is a number.
READY = "ready"


@dataclasses.dataclass(frozen=True)
class RankTask:
    """What a rank needs to know besides its seat."""

    config: EngineConfig
    #: Split over the ranks.
    spec: ModelSpec
    stop_token_ids: tuple[int, ...]


def serve(link: Link) -> None:
    """Load this rank's part of the model, then do steps until told to stop."""
    seat, task = link.seat, link.task
    assert isinstance(task, RankTask)
    torch.set_num_threads(seat.threads)
    device = rank_device(task.config, seat.rank)
    import_libraries(task.config)
    link.reply(READY)
    group = Group.join(seat.meeting, seat.rank, seat.size, device, seat.timeout)

    def loaded() -> None:
        link.reply(READY)
        assert link.next() == READY  # so are the others

    model = RankModel(task.config, task.spec, task.stop_token_ids, group, loaded)
    link.reply(model.plan.num_pages)
    num_pages = link.next()
    assert isinstance(num_pages, int)
    model.allocate(num_pages)
    link.reply(READY)
    while (skeleton := link.next()) is not None:
        assert isinstance(skeleton, Skeleton)
        inputs = skeleton.fill(group.receive(skeleton.shapes))
        assert isinstance(inputs, StepInputs)
        model.candidates(inputs)


def main(descriptor: int) -> None:
    """Serve rank 0; whatever ends that is told to it."""
    link = Link(descriptor)
    name = f"dllm rank {link.seat.rank}"
    logging.basicConfig(format=f"{name}: %(levelname)s %(message)s", level=logging.WARNING)
    try:
        serve(link)
    except DllmError as error:
        link.fail(error)
    except Exception as error:
        logger.exception("rank failed")
        link.fail(EngineDead(f"{type(error).__name__}: {error}"))
    else:
        os._exit(0)  # nothing is left to do, and other ranks may be gone already
    os._exit(1)
