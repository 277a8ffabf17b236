# Workers on vLLM's CPU engine: for the quickstart and for tests, not for speed.
#   docker build -f docker/worker-cpu.Dockerfile -t kvtier/worker-cpu:0.2.0 .

FROM python:3.12-slim AS build
# Builds of torch for CPUs are in an index of PyTorch's, which uv knows. If empty: PyPI's, with 3 GB of CUDA libraries.
ARG TORCH_BACKEND=cpu
RUN python -m venv --without-pip /opt/kvtier \
    && pip install --no-cache-dir uv==0.13.9
WORKDIR /src
# Requirements come first: a change of the sources keeps their layer. Triton and a second NIXL are for GPUs.
COPY pyproject.toml ./
RUN printf '%s; sys_platform == "never"\n' triton nixl-cu12 >overrides.txt \
    && uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python --overrides overrides.txt \
        ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} -r pyproject.toml --extra cpu --extra nixl
COPY README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python --no-deps .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="kvtier worker on CPUs" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# The base image's release decides their versions: a pin would fail with its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /cache /models
COPY --from=build /opt/kvtier /opt/kvtier
ENV PATH=/opt/kvtier/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
WORKDIR /cache
EXPOSE 9090
CMD ["python", "-m", "components.worker", "--help"]
