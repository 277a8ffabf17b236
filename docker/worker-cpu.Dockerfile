# Workers on vLLM's CPU engine: for the quickstart and for tests, not for speed.
#   docker build -f docker/worker-cpu.Dockerfile -t kvtier/worker-cpu:0.2.0 .

FROM python:3.12-slim
# The base image's release decides their versions: a pin would fail with its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv \
    && pip install --no-cache-dir uv==0.13.9 \
    && useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /cache /models
WORKDIR /opt/kvtier
COPY pyproject.toml README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --python /opt/venv/bin/python '.[cpu,nixl]'
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
EXPOSE 9090
CMD ["python", "-m", "components.worker", "--help"]
