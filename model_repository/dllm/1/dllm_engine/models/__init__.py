"""Model families behind one interface, and the loader of their Hugging Face checkpoints."""

from .base import DiffusionModel, ModelSpec, head_copy_bytes
from .loader import load_model, read_spec

__all__ = ["DiffusionModel", "ModelSpec", "head_copy_bytes", "load_model", "read_spec"]
