# The package in an image, for pods:
#
#   docker build --build-arg EXTRAS=tpu,gcs --tag groupvit .        (EXTRAS=cuda,k8s,gcs for GPUs; CPUs without)
#   docker run --volume "$PWD/runs:/runs" groupvit groupvit-train --config=quickstart --workdir=/runs/quickstart
FROM python:3.13-slim
ARG EXTRAS=gcs
WORKDIR /source
COPY pyproject.toml requirements.txt README.md LICENSE NOTICE ./
COPY configs configs
COPY groupvit_jax groupvit_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]"
# As `make` sets it: on CPUs a step's temporaries are GiBs that XLA maps and frees each time.
ENV GLIBC_TUNABLES=glibc.malloc.hugetlb=1
WORKDIR /runs
CMD ["python", "-m", "groupvit_jax"]
