"""The diffusion engine: continuous batching of LLaDA-class models at every denoising step."""

from dllm_engine.config import EngineConfig
from dllm_engine.errors import (
    CheckpointError,
    DllmError,
    EngineDead,
    InvalidConfig,
    InvalidRequest,
    NotStarted,
    QueueFull,
    QueueTimeout,
    RequestFailed,
)
from dllm_engine.llm import LLM
from dllm_engine.loop.engine import Engine, EngineStats
from dllm_engine.loop.engine_thread import EngineThread
from dllm_engine.models.summary import ModelSummary
from dllm_engine.request import (
    CanvasUpdate,
    Completion,
    DenoisingStep,
    FinishReason,
    LogProbs,
    Prompt,
    Request,
    Trajectory,
    Usage,
)
from dllm_engine.sampling_params import SamplingParams
from dllm_engine.scores import Score

__all__ = [
    "LLM",
    "CanvasUpdate",
    "CheckpointError",
    "Completion",
    "DenoisingStep",
    "DllmError",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineStats",
    "EngineThread",
    "FinishReason",
    "InvalidConfig",
    "InvalidRequest",
    "LogProbs",
    "ModelSummary",
    "NotStarted",
    "Prompt",
    "QueueFull",
    "QueueTimeout",
    "Request",
    "RequestFailed",
    "SamplingParams",
    "Score",
    "Trajectory",
    "Usage",
]
