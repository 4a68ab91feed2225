"""Makes sampling state of rows, for tests that draw candidates without an engine."""

import torch
from dllm_engine.sampling.rows import RowSampling, SamplingFlags, needs_full_logits
from torch import Tensor

TYPES = {
    "temperature": torch.float64,
    "top_p": torch.float64,
    "dream_statistics": torch.bool,
    "logits_eos_inf": torch.bool,
    "confidence_eos_eot_inf": torch.bool,
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
        "dream_statistics": False,
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }
    tensors = {
        name: torch.as_tensor(value).expand(rows).to(device, TYPES.get(name, torch.int64))
        for name, value in (defaults | columns).items()
    }
    noisy = tensors["temperature"] > 0
    filtered = (tensors["top_p"] < 1) | (tensors["top_k"] > 0)
    whole = needs_full_logits(noisy, filtered, tensors["dream_statistics"])
    flags = SamplingFlags(
        noisy=bool(noisy.any()),
        top_p=bool((tensors["top_p"] < 1).any()),
        top_k=int(tensors["top_k"].max()),
        logits_eos_inf=bool(tensors["logits_eos_inf"].any()),
        confidence_eos_eot_inf=bool(tensors["confidence_eos_eot_inf"].any()),
    )
    return RowSampling(**tensors, flags=flags, num_full_logits=int(whole.sum()))
