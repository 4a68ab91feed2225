"""The diffusion engine: continuous batching of LLaDA-class models at every denoising step."""

from .config import EngineConfig
from .engine import Engine, EngineStats
from .errors import (
    CheckpointError,
    DllmError,
    EngineDead,
    InvalidConfig,
    InvalidRequest,
    NotRun,
    QueueFull,
    QueueTimeout,
    RequestFailed,
)
from .llm import LLM
from .request import CanvasUpdate, Completion, FinishReason, Prompt, SamplingParams, Usage
from .worker import EngineWorker

__all__ = [
    "LLM",
    "CanvasUpdate",
    "CheckpointError",
    "Completion",
    "DllmError",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineStats",
    "EngineWorker",
    "FinishReason",
    "InvalidConfig",
    "InvalidRequest",
    "NotRun",
    "Prompt",
    "QueueFull",
    "QueueTimeout",
    "RequestFailed",
    "SamplingParams",
    "Usage",
]
