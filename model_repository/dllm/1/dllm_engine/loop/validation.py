"""Checks requests against the model and the memory; an error names the field and the limit."""

from __future__ import annotations

import bisect
import dataclasses
import logging
from typing import Any

from dllm_engine.config import EngineConfig
from dllm_engine.decoding import COMMIT_FIELDS
from dllm_engine.errors import InvalidConfig, InvalidRequest
from dllm_engine.memory.cache_policy import CachePolicy, reserved_rows
from dllm_engine.memory.kv_cache import PageAllocator
from dllm_engine.models.base import BlockAttention, ModelSpec
from dllm_engine.request import Prompt
from dllm_engine.sampling_params import BLOCK_CACHE_POLICIES, CACHE_POLICIES, SamplingParams
from dllm_engine.state.canvas import LONGEST_BLOCK

logger = logging.getLogger("dllm_engine")

#: The value of `remasking` that needs a model which also reads left to right.
SPECULATIVE = "speculative"
_NOT_CAUSAL = "speculative needs a model that also reads left to right (Nemotron)"


def longest_sequence(config: EngineConfig, spec: ModelSpec) -> int:
    """Return the longest sequence in tokens: the configured one, or the checkpoint's.

    Raises:
        InvalidConfig: the checkpoint allows less than is configured.
    """
    wanted = config.max_model_len or spec.max_model_len
    if wanted > spec.max_model_len:
        raise InvalidConfig(
            f"DLLM_MAX_MODEL_LEN: the checkpoint was trained for {spec.max_model_len} tokens; "
            f"got {wanted}"
        )
    return wanted


def check_cache(config: EngineConfig, spec: ModelSpec) -> None:
    """Check the server's default cache policy against the checkpoint.

    Raises:
        InvalidConfig: the policy is not one of the model's kind.
    """
    policies = CACHE_POLICIES if spec.blocks is None else BLOCK_CACHE_POLICIES
    if config.cache not in policies:
        kind = "not block-wise" if spec.blocks is None else "block-wise"
        raise InvalidConfig(
            f"DLLM_CACHE: must be one of {', '.join(policies)} for {spec.architecture}, which is "
            f"{kind}; got {config.cache}"
        )


class RequestLimits:
    """Checks requests before they are queued; thread-safe.

    Args:
        config: the engine's settings.
        spec: the model; its `max_model_len` is the longest sequence served.
        allocator: the pages of keys and values.
        has_text: whether the checkpoint has a tokenizer.
        token_budget: rows that one step may have.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        allocator: PageAllocator,
        *,
        has_text: bool,
        token_budget: int,
    ) -> None:
        self._token_budget = token_budget
        self._config = config
        self._spec = spec
        self._allocator = allocator
        self._has_text = has_text
        #: Block lengths that the log has warned of.
        self._warned: set[int] = set()

    def reading(self, prompt: Prompt) -> SamplingParams:
        """The parameters of a request that only reads log-probabilities.

        Raises:
            InvalidRequest: a token to read does not exist, or the masks cannot be read at once.
        """
        reads, mask = prompt.reads, self._spec.mask_token_id
        assert reads is not None
        size = len(prompt.canvas_ids)
        if reads.ndim != 2 or len(reads) != prompt.canvas_ids.count(mask) or not reads.shape[1]:
            raise InvalidRequest("reads", "must hold at least one token for each mask")
        if reads.min() < -1 or reads.max() >= self._spec.vocab_size:
            raise InvalidRequest("reads", f"ids must lie in -1..{self._spec.vocab_size - 1}")
        if self._spec.blocks is not None:
            if prompt.canvas_ids != [mask]:
                raise InvalidRequest("reads", "a block-wise model reads one mask behind a prompt")
            return SamplingParams(gen_length=1, steps=1, seed=0)
        return SamplingParams(gen_length=size, block_length=size, steps=1, cache="none", seed=0)

    def check(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """Return the parameters with every default filled in.

        Raises:
            InvalidRequest: names the field and the limit.
        """
        if self._spec.blocks is None:
            params = params.with_cache_defaults(self._config.cache_defaults)
            if params.remasking == SPECULATIVE:
                raise InvalidRequest("remasking", _NOT_CAUSAL)
            if params.cache == "block":
                raise InvalidRequest(
                    "cache",
                    f"must be one of {', '.join(CACHE_POLICIES)}; block needs a block-wise model",
                )
        else:
            params = self._block_params(prompt, params, self._spec.blocks)
        self._check_prompt(prompt, params)
        self._check_lengths(prompt, params)
        resolved = params.resolved(blockwise=self._spec.blocks is not None)
        assert resolved.steps is not None
        most = self._spec.max_model_len
        if resolved.steps > most:
            raise InvalidRequest("steps", f"must be at most {most}; got {resolved.steps}")
        return resolved

    def _block_params(
        self, prompt: Prompt, params: SamplingParams, blocks: BlockAttention
    ) -> SamplingParams:
        """Fill in what a block-wise model has its own defaults of.

        Raises:
            InvalidRequest: a field asks for what block-wise models cannot do.
        """
        params = params.with_cache_defaults(self._config.cache_defaults | {"cache": "block"})
        why = "of a block-wise model, whose keys and values are exact"
        if params.cache not in BLOCK_CACHE_POLICIES:
            names = " or ".join(BLOCK_CACHE_POLICIES)
            raise InvalidRequest("cache", f"must be {names} {why}; got {params.cache}")
        length = len(prompt.ids) + params.gen_length
        if params.cache == "none" and length > self._token_budget:
            raise InvalidRequest(
                "cache",
                f"none computes all {length} tokens of prompt and answer in every step; it may be "
                f"{self._token_budget} (DLLM_MAX_NUM_BATCHED_TOKENS)",
            )
        if prompt.suffix_ids:
            raise InvalidRequest("suffix", "must be empty: no token of a block-wise model sees it")
        if params.cfg_scale != 0:
            raise InvalidRequest(
                "cfg_scale", f"must be 0 with a block-wise model; got {params.cfg_scale}"
            )
        if params.alg is not None:
            raise InvalidRequest(
                "alg", "is for Dream's models; this one is block-wise: see remasking"
            )
        size = params.block_length or blocks.block_length
        if size > LONGEST_BLOCK:
            raise InvalidRequest("block_length", f"must be at most {LONGEST_BLOCK}; got {size}")
        if size != blocks.block_length and size not in self._warned:
            self._warned.add(size)
            logger.warning(
                "block_length %d: the checkpoint was trained for %d", size, blocks.block_length
            )
        changed: dict[str, Any] = {"block_length": size}
        asks = [name for name in COMMIT_FIELDS if getattr(params, name) is not None]
        if params.remasking is None and not asks:
            asks = ["confidence_threshold"]
            changed["confidence_threshold"] = blocks.threshold
        if params.remasking == SPECULATIVE:
            if not (blocks.prompt_causal and blocks.first_token_given):
                raise InvalidRequest("remasking", _NOT_CAUSAL)
            if asks:
                raise InvalidRequest(asks[0], f"cannot be combined with remasking {SPECULATIVE}")
            if size < 2:
                raise InvalidRequest("block_length", f"must be at least 2 with {SPECULATIVE}")
        ranks = params.credit or params.low_threshold is not None
        own_rule = asks == ["confidence_threshold"] and not (ranks or blocks.threshold_inclusive)
        if params.remasking is None and own_rule:
            changed["remasking"] = "low_confidence_dynamic"
        return dataclasses.replace(params, **changed)

    def pages(self, params: SamplingParams, length: int, *, copies: int) -> int:
        """Count the pages that a request of `length` tokens holds while it runs."""
        assert params.cache is not None
        assert params.block_length is not None
        assert params.retention_ratio is not None
        rows = reserved_rows(
            CachePolicy[params.cache.upper()],
            length + self._behind(length, params),
            params.block_length + self._spec.shifted,
            params.retention_ratio,
        )
        return self._allocator.pages_for(rows) * copies

    def check_pages(self, params: SamplingParams, length: int, *, copies: int) -> int:
        """Return `pages`.

        Raises:
            InvalidRequest: the server has fewer pages.
        """
        count = self.pages(params, length, copies=copies)
        if count > self._allocator.num_pages:
            raise InvalidRequest(
                "cache",
                f"{params.cache} needs {count} pages of keys and values for a sequence of "
                f"{length} tokens; the server has {self._allocator.num_pages}",
            )
        return count

    def headroom(self, params: SamplingParams, length: int, *, copies: int) -> int:
        """How many tokens longer the prompt of a request of `length` tokens could be."""
        longer = range(length + 1, self._longest(params) + 1)
        return bisect.bisect_right(
            longer,
            self._allocator.num_pages,
            key=lambda tokens: self.pages(params, tokens, copies=copies),
        )

    def _behind(self, length: int, params: SamplingParams) -> int:
        """Positions that complete the last block of a sequence of `length` tokens."""
        blocks = self._spec.blocks
        if blocks is None or blocks.origin != "absolute":
            return 0
        assert params.block_length is not None
        return -length % params.block_length

    def _longest(self, params: SamplingParams) -> int:
        """The longest sequence that `check` allows."""
        most, blocks = self._spec.max_model_len, self._spec.blocks
        if blocks is None:
            return most
        if blocks.origin == "absolute":  # ends with a block
            assert params.block_length is not None
            most -= most % params.block_length
        return min(most, self._token_budget) if params.cache == "none" else most

    def _check_prompt(self, prompt: Prompt, params: SamplingParams) -> None:
        if not prompt.ids:
            problem = "must not be empty: this checkpoint has no start token"
            raise InvalidRequest("input_ids", problem)
        size, mask = self._spec.vocab_size, self._spec.mask_token_id
        for field, ids in (
            ("input_ids", prompt.ids),
            ("canvas_ids", prompt.canvas_ids),
            ("suffix", prompt.suffix_ids),
        ):
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= size:
                got = low if low < 0 else high
                raise InvalidRequest(field, f"ids must lie in 0..{size - 1}; got {got}")
        if prompt.canvas_ids and mask not in prompt.canvas_ids:
            raise InvalidRequest("canvas_ids", f"holds no mask (id {mask})")
        if prompt.canvas_ids and len(prompt.canvas_ids) != params.gen_length:
            rule = f"must hold gen_length ({params.gen_length}) ids"
            raise InvalidRequest("canvas_ids", f"{rule}; got {len(prompt.canvas_ids)}")
        if params.structured_outputs is not None:
            for field, ids in (("canvas_ids", prompt.canvas_ids), ("suffix", prompt.suffix_ids)):
                if ids:
                    raise InvalidRequest(field, "cannot be combined with structured_outputs")
        if params.stop and not self._has_text:
            raise InvalidRequest("stop", "this checkpoint has no tokenizer")

    def _check_lengths(self, prompt: Prompt, params: SamplingParams) -> None:
        most = self._spec.max_model_len
        longest = self._config.max_gen_length or most
        if params.gen_length > longest:
            raise InvalidRequest(
                "gen_length", f"must be at most {longest}; got {params.gen_length}"
            )
        given = prompt.num_tokens
        length = given + params.gen_length
        end = length + self._behind(length, params)
        if end > max(length, most):
            raise InvalidRequest(
                "gen_length",
                f"prompt ({given} tokens) plus gen_length ({params.gen_length}) in whole "
                f"blocks of {params.block_length} must be at most {most}; got {end}",
            )
        if length > most:
            raise InvalidRequest(
                "gen_length",
                f"prompt ({given} tokens) plus gen_length ({params.gen_length}) "
                f"must be at most {most}",
            )
