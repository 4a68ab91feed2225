"""Sampling state of rows, for tests that draw candidates without an engine."""

import torch
from dllm_engine.sampling import RowSampling, SamplingFlags, needs_whole_row
from torch import Tensor

TYPES = {
    "temperature": torch.float64,
    "top_p": torch.float64,
    "tempered": torch.bool,
    "no_eos": torch.bool,
    "late_eos": torch.bool,
}


def row_sampling(rows: int, device: str = "cpu", **columns: float | bool | Tensor) -> RowSampling:
    """Sampling state of `rows` rows, greedy and unfiltered unless said otherwise."""
    defaults: dict[str, float | bool | Tensor] = {
        "temperature": 0.0,
        "seed": 1,
        "step": 0,
        "position": torch.arange(rows),
        "top_p": 1.0,
        "top_k": 0,
        "tempered": False,
        "no_eos": False,
        "late_eos": False,
    }
    tensors = {
        name: torch.as_tensor(value).expand(rows).to(device, TYPES.get(name, torch.int64))
        for name, value in (defaults | columns).items()
    }
    noisy = tensors["temperature"] > 0
    filtered = (tensors["top_p"] < 1) | (tensors["top_k"] > 0)
    whole = needs_whole_row(noisy, filtered, tensors["tempered"])
    flags = SamplingFlags(
        noisy=bool(noisy.any()),
        top_p=bool((tensors["top_p"] < 1).any()),
        top_k=int(tensors["top_k"].max()),
        no_eos=bool(tensors["no_eos"].any()),
        late_eos=bool(tensors["late_eos"].any()),
    )
    return RowSampling(**tensors, flags=flags, num_whole=int(whole.sum()))
