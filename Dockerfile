# Two images of one source: `api` (no torch) and `worker` (torch with CUDA).
#
#   docker build --target api -t dycoke-api .
#   docker build --target worker -t dycoke-worker .
#   docker build --target worker --build-arg DEVICE=cpu -t dycoke-worker-cpu .
#
# Both run as user 10001, need no capability, and write to /data and /tmp only.

ARG PYTHON=3.12

# --- what both are built with ---

FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/dycoke
ENV PATH=/opt/dycoke/bin:$PATH
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-api
COPY pyproject.toml README.md LICENSE ./
COPY dycoke_core dycoke_core
COPY app app
RUN pip install --constraint constraints.txt '.[tracing]'

# torch is 100 times larger than the source and changes 100 times less often: a layer of its own.
FROM build AS build-worker
ARG DEVICE=cuda
RUN case "$DEVICE" in \
      cuda) index=https://pypi.org/simple ;; \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      *) echo "DEVICE must be cuda or cpu" >&2; exit 1 ;; \
    esac \
    && pip install --index-url "$index" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY dycoke_core dycoke_core
COPY app app
RUN pip install --constraint constraints.txt '.[worker,tracing]'

# --- what both run on ---

FROM python:${PYTHON}-slim-bookworm AS runtime
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
