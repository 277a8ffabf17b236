# Workers on vLLM's CPU engine: for the quickstart and for tests, not for speed.
#   docker build -f docker/worker-cpu.Dockerfile -t kvtier/worker-cpu:0.1.0 .

FROM python:3.12-slim
# The base image's release decides their versions: a pin would fail with its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv \
    && useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /cache /models
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1
WORKDIR /opt/kvtier
COPY pyproject.toml README.md LICENSE ./
COPY kvstore kvstore
COPY components components
COPY graphs graphs
COPY benchmarks benchmarks
COPY docker/install_cpu_engine.py docker/
RUN python docker/install_cpu_engine.py nixl
ENV PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
EXPOSE 9090
CMD ["python", "-m", "components.worker", "--help"]
