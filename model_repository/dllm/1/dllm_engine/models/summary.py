"""What a client may want to know about the model that is served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dllm_engine.models.base import DiffusionModel, ModelSpec
from dllm_engine.models.loader import family_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """Name, family and sizes of a served checkpoint."""

    #: The name of the checkpoint's directory.
    checkpoint: str
    #: The engine's name of the family: `llada`, `dream`, `sdar`.
    family: str
    #: The class that `config.json` names.
    architecture: str
    num_parameters: int
    #: Tokens of prompt and canvas together.
    max_model_len: int
    #: The token that `canvas_ids` has at positions to decode.
    mask_token_id: int
    #: Tokens per block of a block-wise model; None where every position sees every other.
    block_length: int | None

    @classmethod
    def of(cls, directory: Path, spec: ModelSpec) -> ModelSummary:
        """Summarise a checkpoint; `spec` may be split over ranks."""
        with torch.device("meta"):
            whole = DiffusionModel(dataclasses.replace(spec, num_ranks=1))
        return cls(
            checkpoint=_readable(directory.resolve().name),
            family=family_of(spec.architecture),
            architecture=spec.architecture,
            num_parameters=sum(parameter.numel() for parameter in whole.parameters()),
            max_model_len=spec.max_model_len,
            mask_token_id=spec.mask_token_id,
            block_length=spec.blocks.block_length if spec.blocks else None,
        )


def _readable(name: str) -> str:
    """The name of a file as text; Triton's interpreter decodes names as ASCII, with surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
