# Two images:  docker build --target triton  -t dllm-serve-triton .
#              docker build --target adapter -t dllm-serve-adapter .
ARG TRITON_TAG=26.06-py3
ARG PYTHON_TAG=3.11-slim

# What each part needs, read from pyproject.toml so that it is written down once.
FROM python:${PYTHON_TAG} AS requirements
WORKDIR /requirements
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py

# NVIDIA's server with the engine's requirements. The engine itself is not installed: it lies in
# the model's version folder, and an installed copy would be imported in its place.
FROM nvcr.io/nvidia/tritonserver:${TRITON_TAG} AS triton
# The kernels are compiled at first use, for which a C compiler and Python's headers are needed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev \
    && rm -rf /var/lib/apt/lists/*
# constraints.txt names the versions that were tested with the server of the wheel. NumPy is left
# to the image, whose other packages were built against its own, and the kernels' compiler to torch.
RUN --mount=type=bind,from=requirements,source=/requirements/engine.txt,target=/tmp/engine.txt \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    grep -v -e '^numpy==' -e '^triton==' /tmp/constraints.txt > /tmp/versions.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -c /tmp/versions.txt -r /tmp/engine.txt \
    && rm /tmp/versions.txt
COPY model_repository /opt/dllm-serve/model_repository
# Where compiled kernels are kept; a volume here saves compiling them after each start.
ENV TRITON_CACHE_DIR=/var/cache/dllm-serve
RUN install -d -o triton-server "$TRITON_CACHE_DIR"
USER triton-server
EXPOSE 8000 8001 8002
# Loading a large model from a slow disk may take half an hour. No proxy leads to this container.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["curl", "--fail", "--silent", "--noproxy", "*", \
         "http://localhost:8000/v2/models/dllm/ready"]
# Completing a configuration would import torch once more at each start.
CMD ["tritonserver", "--model-repository=/opt/dllm-serve/model_repository", \
     "--disable-auto-complete-config", "--exit-timeout-secs=30"]

# The adapter in a virtual environment, so that the image has neither pip's cache nor the sources.
FROM python:${PYTHON_TAG} AS adapter-build
WORKDIR /src
RUN python -m venv /opt/venv
# Dependencies first: editing the code then rebuilds in seconds.
RUN --mount=type=bind,from=requirements,source=/requirements/adapter.txt,target=/tmp/adapter.txt \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install -c /tmp/constraints.txt -r /tmp/adapter.txt
# The engine stays out; `dllm` and `dllm-serve` come with their packages.
COPY pyproject.toml README.md ./
COPY adapter adapter
COPY client client
COPY launcher launcher
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps .

FROM python:${PYTHON_TAG} AS adapter
COPY --from=adapter-build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    DLLM_DATABASE_URL=sqlite:////var/lib/dllm-serve/jobs.db
RUN useradd --system --uid 10001 dllm && install -d -o dllm /var/lib/dllm-serve
USER 10001
WORKDIR /var/lib/dllm-serve
VOLUME /var/lib/dllm-serve
EXPOSE 8000
# Whether it lives: Swarm and the like kill what is unhealthy, and whoever waits for the engine is
# helped by no new adapter. Where to send requests is a question for /v1/health.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://localhost:8000/v1/livez')"]
# WEB_CONCURRENCY sets the number of worker processes. A stop waits no longer for streams.
CMD ["python", "-m", "adapter", "--host", "0.0.0.0", "--port", "8000", \
     "--timeout-graceful-shutdown", "10", "--timeout-keep-alive", "75"]
