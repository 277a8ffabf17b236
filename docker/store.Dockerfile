# Targets, router and frontend: no CUDA, no engine.
#   docker build -f docker/store.Dockerfile -t kvtier/store:0.2.0 .

FROM python:3.12-slim AS build
RUN python -m venv /opt/kvtier \
    && pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --python /opt/kvtier/bin/python '.[dynamo,router]'

FROM python:3.12-slim
RUN useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /data /cache /models
COPY --from=build /opt/kvtier /opt/kvtier
ENV PATH=/opt/kvtier/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache
USER 1000
WORKDIR /home/kvtier
EXPOSE 7600 7690 8000 9090
CMD ["python", "-m", "kvstore", "--help"]
