"""Find DLLM_ variables that no part reads, and the name that was probably meant.

Launcher, adapter and Triton model share one environment but no module, so each has this module.
Change adapter/setting_names.py; `make fields` writes the other two.
"""

import difflib
from collections.abc import Iterable

#: Read by the launcher, the adapter, the engine, the client or the Compose files.
NAMES = (
    # make fields: begin
    "API_KEY",
    "API_KEYS",
    "API_KEYS_FILE",
    "BATCH_INVARIANT",
    "BODY_TIMEOUT",
    "CACHE",
    "CHAT_MAX_TOKENS",
    "CORS_ORIGINS",
    "CUDA_GRAPH_ROWS",
    "DATABASE_TIMEOUT",
    "DATABASE_URL",
    "DELAY_STEPS",
    "DEVICE",
    "DISCOVERY_INTERVAL",
    "DRAIN_SECONDS",
    "DTYPE",
    "ENGINE_IDLE_TIMEOUT",
    "EXIT_ON_ENGINE_DEATH",
    "HEARTBEAT_INTERVAL",
    "HOST",
    "JOB_MAX_ATTEMPTS",
    "KERNELS",
    "KEY_SHARE",
    "KV_PAGE_SIZE",
    "LEASE_SECONDS",
    "LOGITS_BUDGET_MB",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "MAX_BATCH_SIZE",
    "MAX_BODY_BYTES",
    "MAX_CHOICES",
    "MAX_CONNECTIONS_PER_ADDRESS",
    "MAX_GEN_LENGTH",
    "MAX_HELD_POLLS",
    "MAX_INFLIGHT",
    "MAX_LIVE",
    "MAX_MODEL_LEN",
    "MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_SEQS",
    "MAX_PROMPT_CHARS",
    "MAX_QUEUED_JOBS",
    "MAX_QUEUE_SIZE",
    "MAX_TEMPERATURE",
    "MAX_TIMEOUT",
    "MEMORY_LIMIT",
    "METRICS_NEED_KEY",
    "MODEL_NAME",
    "MODEL_REPOSITORY",
    "OVERLAP_ROWS",
    "POLL_INTERVAL",
    "POOL_KERNEL",
    "PORT",
    "PREFIX_CACHE",
    "PROBE_INTERVAL",
    "QUANTIZATION",
    "RATE_LIMIT",
    "REFRESH_INTERVAL",
    "RESULT_TTL",
    "RETENTION_RATIO",
    "SEND_TIMEOUT",
    "SERVED_MODEL_NAME",
    "SHARE_PREFIXES",
    "START_TIMEOUT",
    "STEP_TIMEOUT",
    "STREAM_INTERVAL",
    "TENSOR_PARALLEL_SIZE",
    "TENSOR_PARALLEL_TIMEOUT",
    "TRACING",
    "TRITON_CA_FILE",
    "TRITON_CERT_FILE",
    "TRITON_GRPC_PORT",
    "TRITON_HTTP_PORT",
    "TRITON_KEY_FILE",
    "TRITON_METRICS_PORT",
    "TRITON_PROTOCOL_KEYS_FILE",
    "TRITON_TLS_NAME",
    "TRITON_URL",
    "URL",
    "WORKERS",
    # make fields: end
)
PREFIX = "DLLM_"


def misspelt(variables: Iterable[str]) -> list[str]:
    """A warning for each of these names of variables that begins with DLLM_ and is no setting."""
    warnings = []
    for name in sorted(variables):
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in NAMES:
            near = difflib.get_close_matches(name.removeprefix(PREFIX), NAMES, n=1)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else "; see docs/settings.md"
            warnings.append(f"{name} is not a setting and is ignored{hint}")
    return warnings
