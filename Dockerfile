# Two images of one source: `api` (no torch) and `worker` (torch with CUDA).
#
#   docker build --target api -t dycoke-api .
#   docker build --target worker -t dycoke-worker .
#   docker build --target worker --build-arg DEVICE=cpu -t dycoke-worker-cpu .
#
# Everything that pip installs is checked against the hashes in deploy/requirements. torch comes from
# PyPI with NVIDIA's libraries, or with DEVICE=cpu from PyTorch's own index, without them. The base
# is named by tag; PYTHON_DIGEST=@sha256:... names its content (python -m deploy.resolve_digests).
#
# Both run as user 10001, need no capability, and write to /data and /tmp only.

ARG PYTHON_TAG=3.12.15-slim-bookworm
ARG PYTHON_DIGEST=

# --- what both are built with ---

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_REQUIRE_HASHES=1
RUN python -m venv /opt/dycoke
ENV PATH=/opt/dycoke/bin:$PATH
WORKDIR /src
COPY deploy/requirements requirements

FROM build AS wheel
RUN pip install --requirement requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY dycoke_core dycoke_core
COPY app app
# Of the source above alone: nothing to fetch, and no hash that one could know.
RUN PIP_REQUIRE_HASHES=0 pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels .

FROM build AS build-api
RUN pip install --requirement requirements/api.txt
COPY --from=wheel /wheels /wheels
RUN PIP_REQUIRE_HASHES=0 pip install --no-deps --no-index /wheels/*.whl

# What it takes is 100 times larger than the source and changes 100 times less often: a layer of its
# own.
FROM build AS build-worker
ARG DEVICE=cuda
RUN pip install --requirement "requirements/worker-$DEVICE.txt"
COPY --from=wheel /wheels /wheels
RUN PIP_REQUIRE_HASHES=0 pip install --no-deps --no-index /wheels/*.whl

# --- what both run on ---

FROM python:${PYTHON_TAG}${PYTHON_DIGEST} AS runtime
RUN groupadd --gid 10001 dycoke \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp dycoke \
    && install --directory --owner 10001 --group 10001 /data /data/cache
ENV PATH=/opt/dycoke/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DYCOKE_HOST=0.0.0.0 \
    DYCOKE_DATA_DIR=/data \
    HF_HOME=/data/cache
WORKDIR /data
USER 10001:10001
VOLUME /data
ENTRYPOINT ["python", "-m", "app"]

FROM runtime AS api
COPY --from=build-api /opt/dycoke /opt/dycoke
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
CMD ["api"]

# Loading a large model takes minutes, which the start period must cover.
FROM runtime AS worker
COPY --from=build-worker /opt/dycoke /opt/dycoke
ENV TRITON_CACHE_DIR=/data/cache/triton
EXPOSE 9400
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=4 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9400/metrics', timeout=8)"]
CMD ["worker"]
