"""Measures our kernels against the roofline, beside torch's operations and libraries; see `gpu`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from dllm_engine.ops.dispatch import Operations, choose_operations

from benchmarks.gpu_arithmetic import DREAM, LLADA, Ceilings, Sequences, Shape
from benchmarks.gpu_cases import (
    BLOCK,
    Case,
    Tensors,
    attention_case,
    gate_case,
    head_cases,
    rms_norm_case,
    rotary_case,
    selection_case,
)
from benchmarks.gpu_timing import Timer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes to measure."""

    shapes: tuple[Shape, ...]
    attention: tuple[tuple[Sequences, ...], ...]
    #: Sequences, and candidates per sequence.
    selection: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    head_rows: tuple[int, ...]


REAL = Sizes(
    shapes=(LLADA, DREAM),
    attention=(
        *((Sequences(count, 1024),) for count in (1, 2, 4, 8, 16)),
        *((Sequences(n, BLOCK, stored),) for n in (32, 128) for stored in (256, 1024, 4096)),
        (
            Sequences(2, 1024),
            Sequences(3, 352),
            Sequences(48, BLOCK, 1024),
            Sequences(16, 17, 512),
        ),
    ),
    selection=((4, 1024), (4, 4096)),
    rows=(1024, 16384),
    head_rows=(16, 128, 512, 1024, 4096),
)
#: Like real sizes, but small: groups of query heads, a mixture, more than one page.
TINY = Sizes(
    shapes=(
        Shape("tiny LLaDA", 2, 32, 2, 2, 48, 200),
        Shape("tiny Dream", 2, 112, 7, 1, 48, 200),
    ),
    attention=((Sequences(1, 40),), (Sequences(2, 8, 64), Sequences(1, 20))),
    selection=((1, 40),),
    rows=(5,),
    head_rows=(3,),
)


def measure_kernels(
    timer: Timer, ceilings: Ceilings, sizes: Sizes, done: Callable[[list[dict[str, Any]]], bool]
) -> None:
    """Time every case; `done` gets the results so far and returns whether to go on."""
    operations = choose_operations("triton", timer.device, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for case in _cases(Tensors(timer.device), operations, sizes):
        rows.append(measure_case(case, timer, ceilings))
        del case  # frees its inputs before the next case is made
        if not done(rows):
            return


def _cases(tensors: Tensors, operations: Operations, sizes: Sizes) -> Iterator[Case]:
    """Make the cases one at a time, since some inputs are gigabytes."""
    for shape in sizes.shapes:
        yield from head_cases(tensors, operations, shape, sizes.head_rows)
        for groups in sizes.attention:
            yield attention_case(tensors, operations, shape, groups)
        for count, candidates in sizes.selection:
            yield selection_case(tensors, shape, count, candidates)
        for count in sizes.rows:
            yield rms_norm_case(tensors, operations, shape, count)
            yield rotary_case(tensors, operations, shape, count)
            yield gate_case(tensors, operations, shape, count)


@torch.inference_mode()
def measure_case(case: Case, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """Time and compare one case; a failure puts its error in place of the time."""
    row: dict[str, Any] = {"kernel": case.kernel, "model": case.model, "case": case.name}
    least = ceilings.seconds(case.cost)
    row |= {
        "bytes": case.cost.bytes,
        "flops": case.cost.flops,
        "limit": ceilings.limit(case.cost),
        "roofline_seconds": least,
    }
    try:
        row["agreement"] = case.agreement()
        row["seconds"] = timer.seconds(case.ours)
        row["share_of_roofline"] = least / row["seconds"]
        row["torch_seconds"] = timer.seconds(case.torch)
    except Exception as error:  # noqa: BLE001  measure the other cases anyway
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    for name, work in case.libraries.items():
        try:
            row.setdefault("library_seconds", {})[name] = timer.seconds(work)
        except Exception as error:  # noqa: BLE001
            row.setdefault("library_errors", {})[name] = f"{type(error).__name__}: {error}"[:200]
    return row
