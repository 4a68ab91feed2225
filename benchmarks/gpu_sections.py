"""The sections of `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_engine import LLM, SamplingParams

from benchmarks.baselines import Work
from benchmarks.checkpoints import DREAM_7B, LLADA_8B, random_bf16
from benchmarks.gpu_arithmetic import Ceilings
from benchmarks.gpu_baselines import measure_baselines, random_prompts, run_checkout
from benchmarks.gpu_compile import CARD_SIZES, HOST_SIZES, measure_compiled
from benchmarks.gpu_engine import Measurement, Point, further_points, important_points
from benchmarks.gpu_kernels import REAL, TINY, measure_kernels
from benchmarks.gpu_report import Record, label
from benchmarks.gpu_timing import Timer, measure_ceilings
from benchmarks.throughput import POLICIES
from tests.support.checkpoints import MASK

#: Engine settings of the sections that change the defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {},
    "no-graphs": {"cuda_graph_rows": 0},
    "no-overlap": {"overlap_rows": 0},
    "torch": {"kernels": "torch"},
    "dream": {},
    "batch-invariant": {"batch_invariant": True},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
}
#: Longest time of a point on the engine; unfinished requests are cut off then.
_POINT_SECONDS = 15.0
#: Seconds of Poisson arrivals.
_POISSON_SECONDS = 30.0


class Section:
    """One section on this machine.

    Args:
        options: the command's options.
        record: gets the results.
        left: remaining seconds.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        record: Record,
        left: Callable[[], float],
    ) -> None:
        self._name, self._options, self._record, self._left = name, options, record, left
        self._tiny: bool = options.tiny
        self._device = "cpu" if self._tiny else "cuda"

    def run(self) -> None:
        """Measure and record."""
        if self._name in SETTINGS:
            self._engine()
        else:
            {
                "ceilings": self._ceilings,
                "kernels": self._kernels,
                "compile": self._compile,
                "baselines": self._baselines,
                "fast-dllm": self._checkout,
                "dllm-serve": self._checkout,
            }[self._name]()

    def _save(self, found: Any) -> None:
        self._record.write(self._name, found)

    def _ceilings(self) -> Ceilings:
        timer = Timer(self._device)
        sizes = {"copied": 2**16, "width": 64} if self._tiny else {}
        found = measure_ceilings(timer, **sizes)
        self._record.write("ceilings", dataclasses.asdict(found))
        return found

    def _kernels(self) -> None:
        known = self._record.read()["sections"].get("ceilings")
        ceilings = Ceilings(**known) if known else self._ceilings()

        def done(rows: list[dict[str, Any]]) -> bool:
            self._save(rows)
            return self._left() > 0

        measure_kernels(Timer(self._device), ceilings, TINY if self._tiny else REAL, done)

    def _compile(self) -> None:
        def done(rows: list[dict[str, Any]]) -> bool:
            self._save(rows)
            return self._left() > 0

        measure_compiled(self._device, HOST_SIZES if self._tiny else CARD_SIZES, done)

    def _checkpoint(self, family: str) -> Path:
        sizes = {"llada": LLADA_8B, "dream": DREAM_7B}[family]
        layers = {"llada": "n_layers", "dream": "num_hidden_layers"}[family]
        fields = {layers: 1} if self._tiny else sizes
        return random_bf16(self._options.checkpoints / family, family, self._device, **fields)

    def _llm(self, family: str, **settings: Any) -> LLM:
        if self._tiny:
            small = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}
            tiny: dict[str, Any] = {"device": "cpu", "kernels": "triton", "kv_page_size": 8}
            settings = small | tiny | settings
        else:
            settings = {"device": "cuda", "max_num_seqs": 128, "max_model_len": 4096} | settings
        return LLM(self._checkpoint(family), **settings)

    def _engine(self) -> None:
        name = self._name
        llm = self._llm("dream" if name == "dream" else "llada", **SETTINGS[name])
        plan = dataclasses.asdict(llm.engine.runner.plan)

        def done(rows: list[dict[str, Any]]) -> None:
            row = rows[-1]
            print(f"{name} {label(row)}: {row['tokens_per_second']:.0f} tokens/s", flush=True)
            self._save({"memory_plan": plan, "rows": rows})

        measurement = Measurement(
            llm.engine, self._left, math.inf if self._tiny else _POINT_SECONDS, done
        )
        first, load, rest = _points(name, self._tiny)
        measurement.run(first)
        if load is not None and measurement.rows:
            best = max(row["tokens_per_second"] for row in measurement.rows if _alike(row, load))
            measurement.poisson(load, best, 0.1 if self._tiny else _POISSON_SECONDS)
        measurement.run(rest)

    def _work(self) -> Work:
        return Work(8, 4, MASK) if self._tiny else Work(128, 32, LLADA_8B["mask_token_id"])

    def _baselines(self) -> None:
        sizes = {"prompt_length": 6, "static_batch": 2} if self._tiny else {}
        measure_baselines(
            self._checkpoint("llada"), self._device, self._work(), self._left, self._save, **sizes
        )

    def _checkout(self) -> None:
        work, original = self._work(), self._name == "dllm-serve"
        count = (32 if original else 3) if not self._tiny else 2
        length = 6 if self._tiny else 128
        prompts = random_prompts(count, length, work.mask_id).tolist()
        job = {
            "prompts": prompts,
            "gen_length": work.gen_length,
            "block_length": work.block_length,
            "mask_id": work.mask_id,
            "device": self._device,
            "dtype": "float32" if self._tiny else "bfloat16",
            "at_once": count,
        }
        checkpoint = self._checkpoint("llada")
        folder = getattr(self._options, self._name.replace("-", "_"))
        found = run_checkout(
            self._name,
            folder,
            checkpoint,
            job,
            python=self._options.checkout_python,
            limit=self._left(),
        )
        tokens = found.pop("tokens", None)
        if self._tiny and tokens is not None and not original:
            # In float32 rounding rarely decides between tokens; in bfloat16 it often does.
            params = SamplingParams(
                gen_length=work.gen_length,
                block_length=work.block_length,
                cache="dual",
                ignore_eos=True,
            )
            answers = self._llm("llada", kernels="torch").generate(prompts, params, progress=False)
            ours = [answer.token_ids.tolist() for answer in answers]
            found["same_tokens_as_dual"] = ours == tokens
        print(f"{self._name}: {found}")
        sizes = {"requests": count, "prompt_length": length, "gen_length": work.gen_length}
        self._save(sizes | found)


def _points(name: str, tiny: bool) -> tuple[list[Point], Point | None, list[Point]]:
    """First points, the point with Poisson arrivals, and further points."""
    if tiny:
        small: dict[str, Any] = {
            "requests": 2,
            "prompt_length": 6,
            "gen_length": 4,
            "block_length": 2,
        }
        first = {
            "engine": [Point(**small), Point("sparse", **small, tokens_per_step=2)],
            "torch": [Point(policy, **small, confidence_threshold=0.9) for policy in POLICIES],
            "dream": [Point("delayed", **small)],
        }.get(name, [Point(**small)])
        return first, first[0] if name == "torch" else None, []
    if name == "engine":
        return important_points(), Point(requests=64), further_points()
    first = [Point(requests=n) for n in (32, 1, 8, 64, 128)]
    first += [Point(policy) for policy in ("delayed", "sparse", "prefix", "none")]
    return [*first, Point(prompt_length=1024)], None, []


def _alike(row: dict[str, Any], point: Point) -> bool:
    """Whether a row has the same requests, at any concurrency."""
    fields = dataclasses.asdict(point)
    return all(row[field] == value for field, value in fields.items() if field != "requests")
