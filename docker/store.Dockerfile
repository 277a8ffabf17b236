# Targets: no Dynamo, no torch.
#   docker build -f docker/store.Dockerfile -t kvtier/store:0.2.0 .

FROM python:3.12-slim AS build
# The base image's release decides its version: a pin would fail with its next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends -y binutils \
    && python -m venv --without-pip /opt/kvtier \
    && pip install --no-cache-dir uv==0.13.9
WORKDIR /src
# Requirements come first: a change of the sources keeps their layer. Tests and debug symbols are a fifth of them.
COPY pyproject.toml ./
RUN uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python -r pyproject.toml \
    && find /opt/kvtier -type d -name tests -prune -exec rm -r {} + \
    && find /opt/kvtier -name '*.so' -not -path '*.libs/*' -exec strip --strip-debug {} +
COPY README.md LICENSE ./
COPY docker/prometheus docker/prometheus
COPY docker/grafana docker/grafana
COPY kvstore kvstore
COPY components components
COPY graphs graphs
RUN uv pip install --no-cache --compile-bytecode --python /opt/kvtier/bin/python --no-deps .

FROM python:3.12-slim
LABEL org.opencontainers.image.title="kvtier store" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 1000 --create-home kvtier \
    && install -d -o kvtier -g kvtier /data
COPY --from=build /opt/kvtier /opt/kvtier
ENV PATH=/opt/kvtier/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 1000
WORKDIR /home/kvtier
EXPOSE 7600 7690
CMD ["python", "-m", "kvstore", "--help"]
