# The image of a node: the project with PyTorch's CUDA build and Ray, run by an ordinary user.
#
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" -t heartseg:latest .
#   docker run --rm --gpus all --shm-size 8g -v /data:/data:ro -v "$PWD/runs:/home/heartseg/app/runs" heartseg:latest \
#       python jobs/train.py camus --data /data/shards --runs /home/heartseg/app/runs
#
# A GPU needs only the host's NVIDIA driver and container toolkit: the CUDA libraries come with PyTorch's wheels.
# (`--build-arg SOURCE=…` puts the address of your repository into the labels.)
# A mounted folder that jobs write to must belong to user 1000. Secrets are passed at run time (-e WANDB_API_KEY, without a
# value, passes the caller's) and never become part of a layer.
#
# No Docker engine has built this file yet: tests/cluster/test_dockerfile.py reads it, and runs its installation steps, with
# uv in place of pip, in a clean environment.

FROM python:3.11-slim AS builder
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Every package by version and hash (`make constraints`), wheels only: nothing is compiled and nothing else is installed. This
# layer is reused while only the project's own code changes.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --require-hashes --only-binary :all: --requirement constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY heartseg/ heartseg/
RUN pip install --no-deps --no-index --no-build-isolation . && pip check

FROM python:3.11-slim
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="heartseg" \
      org.opencontainers.image.description="Distributed training of cardiac segmentation on CAMUS. Research use only, not a medical device." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim"
# The head of a `ray up` cluster reaches its workers by ssh and rsync, from inside this container. `ray up` runs its commands
# in a login shell, which resets PATH: the file in /etc/profile.d keeps the environment's programs on it.
# gcc is for Triton, which compiles its launcher for `--train.compile`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev openssh-client rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --user-group --shell /bin/bash heartseg \
    && mkdir -m 700 /home/heartseg/.ray \
    && mkdir /home/heartseg/app \
    && chown heartseg:heartseg /home/heartseg/.ray /home/heartseg/app \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/heartseg.sh
COPY --from=builder /opt/venv /opt/venv
# HOME is set because `ray up` reads it from here to place what it mounts.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/heartseg \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/heartseg/app
COPY jobs/ jobs/
COPY cluster/ cluster/
COPY ray_cluster.yaml constraints.txt LICENSE ./
# Checks the node's Ray if the container runs one (it answers without a token), otherwise that a job's imports work.
HEALTHCHECK --interval=5m --timeout=90s --start-period=60s --retries=3 \
    CMD ["python", "cluster/health.py"]
CMD ["python", "jobs/train.py", "--help"]
