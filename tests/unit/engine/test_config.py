"""Settings of the engine, from strings of the environment and from arguments of `LLM`."""

from pathlib import Path
from typing import Any

import pytest
from dllm_engine import LLM, Engine, EngineConfig, InvalidConfig

BAD = {
    "DLLM_DEVICE": ["gpu", "cuda:x", "mps"],
    "DLLM_DTYPE": ["int3"],
    "DLLM_KERNELS": ["cuda"],
    "DLLM_QUANTIZATION": ["int3"],
    "DLLM_BATCH_INVARIANT": ["maybe"],
    "DLLM_CUDA_GRAPH_ROWS": ["-1", "many"],
    "DLLM_OVERLAP_ROWS": ["-1", "1.5"],
    "DLLM_MAX_NUM_SEQS": ["0", "many"],
    "DLLM_MAX_QUEUE_SIZE": ["-1"],
    "DLLM_MAX_NUM_BATCHED_TOKENS": ["0"],
    "DLLM_MAX_MODEL_LEN": ["0"],
    "DLLM_MAX_GEN_LENGTH": ["0"],
    "DLLM_LOGITS_BUDGET_MB": ["0"],
    "DLLM_CACHE": ["daul"],
    "DLLM_RETENTION_RATIO": ["2", "nan"],
    "DLLM_POOL_KERNEL": ["2", "x"],
    "DLLM_DELAY_STEPS": ["-1"],
    "DLLM_REFRESH_INTERVAL": ["-1"],
    "DLLM_MEMORY_LIMIT": ["lots"],
    "DLLM_KV_PAGE_SIZE": ["0"],
    "DLLM_PREFIX_CACHE": ["maybe"],
    "DLLM_STEP_TIMEOUT": ["-1", "inf", "soon"],
    "DLLM_TENSOR_PARALLEL_SIZE": ["0"],
    "DLLM_TENSOR_PARALLEL_TIMEOUT": ["0", "nan"],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def test_every_setting_has_a_bad_value_here() -> None:
    """A new setting must be tried too; any text may be a path."""
    assert {"MODEL_PATH", *BAD} == set(EngineConfig.settings())


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_names_the_setting(name: str, value: str, checkpoint: Path) -> None:
    """One line names the variable, the value, and what it may be."""
    settings = {"MODEL_PATH": str(checkpoint), "DLLM_DEVICE": "cpu", name: value}
    with pytest.raises(InvalidConfig) as caught:
        Engine(EngineConfig.from_mapping(settings))
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert value in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cahce": "dual"}, "unknown setting cahce; did you mean cache?"),
        ({"max_num_seqs": "64"}, "DLLM_MAX_NUM_SEQS: must be a whole number, got '64'"),
        ({"max_num_seqs": True}, "DLLM_MAX_NUM_SEQS: must be a whole number, got True"),
        ({"step_timeout": "1"}, "DLLM_STEP_TIMEOUT: must be a number, got '1'"),
        ({"batch_invariant": "on"}, "DLLM_BATCH_INVARIANT: must be True or False, got 'on'"),
        ({"device": None}, "DLLM_DEVICE: must be a string, got None"),
    ],
)
def test_arguments_are_refused_like_variables(
    checkpoint: Path, settings: dict[str, Any], said: str
) -> None:
    """An argument of another name or type is an `InvalidConfig`, not Python's own error."""
    with pytest.raises(InvalidConfig) as caught:
        LLM(checkpoint, **settings)
    assert str(caught.value) == said


def test_an_unknown_setting_is_told_with_the_nearest() -> None:
    """Parameters of config.pbtxt are checked like variables."""
    with pytest.raises(InvalidConfig, match="unknown setting DLLM_CAHCE; did you mean DLLM_CACHE"):
        EngineConfig.from_mapping({"MODEL_PATH": "x", "DLLM_CAHCE": "dual"})
