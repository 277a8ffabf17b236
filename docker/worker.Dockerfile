# Workers on GPUs: this project on top of Dynamo's public vLLM image, of which it changes no package.
#   docker build -f docker/worker.Dockerfile -t kvtier/worker:0.2.0 .

FROM nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.6.1
USER 0
LABEL org.opencontainers.image.title="kvtier worker" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /opt/kvtier
# Requirements come first: a change of the sources keeps their layer. Dynamo's images bring uv, and not always pip.
# --no-config: without the overrides in pyproject.toml.
COPY pyproject.toml ./
RUN uv pip install --no-cache --no-config --python python3 -r pyproject.toml --extra worker --extra router \
    && install -d -o 1000 -g 1000 /cache /models
COPY README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --no-config --python python3 --no-deps .
ENV PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
EXPOSE 9090
CMD ["python", "-m", "components.worker", "--help"]
