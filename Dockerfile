# docker build --target cpu|cuda -t slipstream .
FROM python:3.12-slim AS base
# g++: vLLM and torch compile small kernels when they start.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /slipstream
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
ENTRYPOINT ["/slipstream/.venv/bin/python", "launch/cluster.py"]

# Packages are installed before the sources are copied, so that a change of the sources does not repeat it.
FROM base AS cpu
COPY launch/setup.sh launch/install.py launch/
COPY launch/locks/ launch/locks/
RUN ENGINE=cpu bash launch/setup.sh
COPY . .

FROM base AS cuda
COPY launch/setup.sh launch/install.py launch/
COPY launch/locks/ launch/locks/
RUN ENGINE=cuda bash launch/setup.sh
COPY . .
