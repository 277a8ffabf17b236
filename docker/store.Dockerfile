# Targets, router and frontend: no CUDA, no engine.
#   docker build -f docker/store.Dockerfile -t kvtier/store:0.1.0 .

FROM python:3.12-slim AS build
RUN python -m venv /opt/kvtier
ENV PATH=/opt/kvtier/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kvstore kvstore
COPY components components
COPY graphs graphs
COPY benchmarks benchmarks
# All that pyproject.toml asks for but torch, which only workers use.
RUN python -c "import tomllib; d = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; print(*(r for r in d if not r.startswith('torch')), sep='\n')" > /requirements.txt \
    && pip install --no-cache-dir -r /requirements.txt \
    && pip install --no-cache-dir --no-deps .

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
