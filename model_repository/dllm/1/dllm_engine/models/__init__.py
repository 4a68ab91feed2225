"""Model families behind one interface, and the loader of their Hugging Face checkpoints."""

from dllm_engine.models.base import DiffusionModel, ModelSpec, head_copy_bytes
from dllm_engine.models.loader import load_model, read_spec

__all__ = ["DiffusionModel", "ModelSpec", "head_copy_bytes", "load_model", "read_spec"]
