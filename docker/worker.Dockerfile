# Workers on GPUs: this project on top of Dynamo's public vLLM image, whose engine stays as it is.
#   docker build -f docker/worker.Dockerfile -t kvtier/worker:0.1.0 .

FROM nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.4.2
USER 0
WORKDIR /opt/kvtier
COPY pyproject.toml README.md LICENSE ./
COPY kvstore kvstore
COPY components components
COPY graphs graphs
COPY benchmarks benchmarks
# Torch and Dynamo are there, in the builds that the engine wants.
RUN python3 -c "import tomllib; d = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; print(*(r for r in d if not r.startswith(('torch', 'ai-dynamo', 'pydantic'))), sep='\n')" > requirements.txt \
    && python3 -m pip install --no-cache-dir -r requirements.txt \
    && python3 -m pip install --no-cache-dir --no-deps . \
    && install -d -o 1000 -g 1000 /cache /models
ENV PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache
USER 1000
EXPOSE 9090
CMD ["python", "-m", "components.worker", "--help"]
