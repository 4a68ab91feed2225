"""Decodes with another system's code: `python gpu_checkouts.py SYSTEM CHECKOUT CHECKPOINT < job`.

This script imports nothing of this repository: it runs in its own process, if necessary in its own
environment, so the checkout's modules and requirements cannot clash with ours. The checkouts are
not part of this repository. The job is JSON: `prompts` (token ids, of equal lengths),
`gen_length`, `block_length`, `mask_id`, `device`, `dtype`, and `at_once`. The last line of what it
prints is JSON: `tokens_per_second`, `seconds`, `tokens` (of each prompt), and `notes`.

- `fast-dllm`: github.com/NVlabs/Fast-dLLM, LLaDA with its dual cache, one request after another,
  as its `generate_with_dual_cache` requires. It needs the package einops.
- `dllm-serve`: github.com/chosen-ox/dLLM-Serve, through `LLM.generate`, all requests at once, with
  its head-centric sparse attention at a retention of 0.5. It needs a GPU and the package
  xxhash. **We have never run it: this part was written from reading its code**, and tried on a CPU
  up to the point where that code needs NCCL. Without flash-attn, torch's own FlashAttention-2
  replaces it, and `notes` says so.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch


def fast_dllm(checkout: Path, checkpoint: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run Fast-dLLM: one request after another."""
    # The repository had its LLaDA in two places over time.
    folder = next(f for f in (checkout / "v1/llada", checkout / "llada") if f.is_dir())
    sys.path.insert(0, str(folder))
    from generate import generate_with_dual_cache
    from model.configuration_llada import LLaDAConfig
    from model.modeling_llada import (
        LLaDAModel,
        LLaDAModelLM,
        create_model_config_from_pretrained_config,
    )
    from safetensors.torch import load_file

    fields = json.loads((checkpoint / "config.json").read_text())
    # On "meta" no weights are allocated before the checkpoint's are loaded.
    config = LLaDAConfig(**fields | {"init_device": "meta", "flash_attention": False})
    inner = LLaDAModel(create_model_config_from_pretrained_config(config), init_params=False)
    model = LLaDAModelLM(config, model=inner)
    device, dtype = job["device"], getattr(torch, job["dtype"])
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= {k: v.to(device, dtype) for k, v in load_file(file).items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    model = model.eval()

    def decode(ids: list[int], gen_length: int) -> list[int]:
        prompt = torch.tensor([ids], device=device)
        found, _ = generate_with_dual_cache(
            model,
            prompt,
            steps=gen_length,
            gen_length=gen_length,
            block_length=job["block_length"],
            temperature=0.0,
            remasking="low_confidence",
            mask_id=job["mask_id"],
        )
        tokens: list[int] = found[0, len(ids) :].tolist()  # this waits for the device
        return tokens

    prompts = job["prompts"]
    decode(prompts[0], job["block_length"])
    began = time.perf_counter()
    tokens = [decode(ids, job["gen_length"]) for ids in prompts]
    return _found(job, tokens, time.perf_counter() - began, [])


def dllm_serve(checkout: Path, checkpoint: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run dLLM-Serve: all requests at once. We have never run it."""
    notes = ["written from reading; see benchmarks/gpu_checkouts.py"]
    if importlib.util.find_spec("flash_attn") is None:
        sys.modules["flash_attn"] = _flash_attn_from_torch()
        notes.append("torch's own FlashAttention-2 in the place of flash-attn")
    sys.path.insert(0, str(checkout))
    from transformers import AutoConfig, PretrainedConfig

    class LladaConfig(PretrainedConfig):  # type: ignore[misc]
        """Keeps fields unchanged; the checkpoint has no code of its own."""

        model_type = "llada"

    AutoConfig.register("llada", LladaConfig)
    from dllmserve import LLM, SamplingParams
    from dllmserve.sparse.state import SparseConfig

    with tempfile.TemporaryDirectory() as folder:
        view = Path(folder)
        config = json.loads((checkpoint / "config.json").read_text())
        config.pop("auto_map", None)
        (view / "config.json").write_text(json.dumps(config))
        for file in checkpoint.glob("*.safetensors"):
            (view / file.name).symlink_to(file.resolve())
        _write_any_tokenizer(view)
        llm = LLM(str(view), max_num_seqs=job["at_once"])
    sparse = SparseConfig(
        enabled=True,
        default_block_len=job["block_length"],
        retention_ratio=0.5,
        head_select=True,
    )

    def decode(prompts: list[list[int]], gen_length: int) -> list[list[int]]:
        asked = SamplingParams(temperature=0, gen_length=gen_length, steps=gen_length)
        answers = llm.generate(prompts, asked, sparse_configs=sparse, use_tqdm=False)
        return [list(answer["token_ids"]) for answer in answers]

    prompts = job["prompts"]
    decode(prompts, job["block_length"])
    began = time.perf_counter()
    tokens = decode(prompts, job["gen_length"])
    return _found(job, tokens, time.perf_counter() - began, notes)


def _flash_attn_from_torch() -> types.ModuleType:
    """Replace the one flash-attn function that diffusion models call by torch's own."""

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            0.0,
            causal,
            False,
            scale=softmax_scale,
        )[0]
        return out

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    module.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
    return module


def _write_any_tokenizer(directory: Path) -> None:
    """Write a tokenizer that `AutoTokenizer` loads; prompts are token ids, texts are not used."""
    from tokenizers import Tokenizer, models

    end = "<|endoftext|>"
    Tokenizer(models.WordLevel({end: 0}, unk_token=end)).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _found(
    job: dict[str, Any], tokens: list[list[int]], seconds: float, notes: list[str]
) -> dict[str, Any]:
    return {
        "tokens_per_second": len(tokens) * job["gen_length"] / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "notes": notes,
    }


def main() -> None:
    """Decode the job on standard input."""
    system, checkout, checkpoint = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    decode = {"fast-dllm": fast_dllm, "dllm-serve": dllm_serve}[system]
    print(json.dumps(decode(checkout, checkpoint, json.load(sys.stdin))))


if __name__ == "__main__":
    main()
