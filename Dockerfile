# Two images: `docker build --target cpu .` and `docker build --target cuda .`; docs/deploy.md has how to run them.
# Dependencies are installed before the sources are copied: a change of code installs neither torch nor anything else again.
ARG CPU_BASE=python:3.12-slim-bookworm
ARG CUDA_BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint global ignore=DL3006,DL3008
# The bases are arguments, with a tag each; Debian keeps no old versions to pin.

# ---- CPU: what is needed to build, and the dependencies ----
FROM ${CPU_BASE} AS cpu-dependencies
# PyTorch's index of CPU wheels, which its installation page names. Without it torch comes from where pip finds it, and
# may bring gigabytes of CUDA's libraries that this image has no use for.
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hnet
ENV PATH=/opt/hnet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch numpy
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py otel > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# ---- CUDA: the same on a base whose Python comes from the distribution; torch brings CUDA's libraries and triton ----
FROM ${CUDA_BASE} AS cuda-dependencies
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hnet
ENV PATH=/opt/hnet/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch numpy
COPY pyproject.toml deploy/requirements.py ./
RUN python requirements.py otel > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# ---- the package itself, its native kernels compiled for every instruction set of the platform ----
FROM cpu-dependencies AS cpu-build
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM cuda-dependencies AS cuda-build
COPY . .
RUN pip install --no-deps --no-build-isolation .

# ---- what runs ----
FROM ${CPU_BASE} AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /var/cache/hnet --create-home --shell /usr/sbin/nologin hnet
COPY --from=cpu-build /opt/hnet /opt/hnet
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hnet-serve" \
      org.opencontainers.image.description="An inference server for H-Net byte-level language models (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Downloaded models and packed weights go to the volume; besides it only /tmp is written (the engine's sockets).
ENV PATH=/opt/hnet/bin:$PATH \
    HNET_HOST=0.0.0.0 \
    HF_HOME=/var/cache/hnet/huggingface \
    XDG_CACHE_HOME=/var/cache/hnet \
    OMP_WAIT_POLICY=passive \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/cache/hnet
VOLUME /var/cache/hnet
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('HNET_PORT', 8000)}/health\", timeout=2)"]
ENTRYPOINT ["tini", "--", "hnet"]
CMD ["serve"]

FROM ${CUDA_BASE} AS cuda
# Triton compiles its kernels when the engine first starts, and what launches them with a C compiler. Both go to the volume.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --home-dir /var/cache/hnet --create-home --shell /usr/sbin/nologin hnet
COPY --from=cuda-build /opt/hnet /opt/hnet
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hnet-serve" \
      org.opencontainers.image.description="An inference server for H-Net byte-level language models (CUDA)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/hnet/bin:$PATH \
    HNET_HOST=0.0.0.0 \
    HF_HOME=/var/cache/hnet/huggingface \
    XDG_CACHE_HOME=/var/cache/hnet \
    TRITON_CACHE_DIR=/var/cache/hnet/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/cache/hnet
VOLUME /var/cache/hnet
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('HNET_PORT', 8000)}/health\", timeout=2)"]
ENTRYPOINT ["tini", "--", "hnet"]
CMD ["serve"]
