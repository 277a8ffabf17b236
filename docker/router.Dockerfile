# Router and frontend: Dynamo without an engine.
#   docker build -f docker/router.Dockerfile -t kvtier/router:0.2.0 .

FROM python:3.12-slim AS build
RUN python -m venv --without-pip /opt/kvtier \
    && pip install --no-cache-dir uv==0.13.9
WORKDIR /src
# Requirements come first: a change of the sources keeps their layer.
COPY pyproject.toml ./
RUN uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python -r pyproject.toml --extra dynamo --extra router
COPY README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python --no-deps .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="kvtier router and frontend" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /cache /models
COPY --from=build /opt/kvtier /opt/kvtier
# A read-only container writes to /cache and /tmp alone.
ENV PATH=/opt/kvtier/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
WORKDIR /cache
EXPOSE 8000 8300 9090
CMD ["python", "-m", "components.router", "--help"]
