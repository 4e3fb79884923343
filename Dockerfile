# A worker of Prefect with everything that flows need, from the same pinned versions as `make quickstart`:
#   docker build -t mild .
#   docker run -e PREFECT_API_URL=http://server:4200/api -v /data:/data mild
#   docker run --gpus all -e PREFECT_API_URL=... -v /data:/data mild prefect worker start --pool mild-gpu
FROM python:3.11-slim
# git is for deployments that clone a repository.
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mild
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY dataset_tools dataset_tools
COPY mild mild
COPY flows flows
RUN make .venv/.compiled
ENV PATH=/opt/mild/.venv/bin:$PATH
WORKDIR /data
CMD ["prefect", "worker", "start", "--pool", "mild-cpu"]
