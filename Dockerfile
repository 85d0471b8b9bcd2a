# One image for Tolaria and for the reference peers:
#   tolaria serve
#   tolaria peer tamiyo  --listen 0.0.0.0:50052
#   tolaria peer kasmina --listen 0.0.0.0:50053
#
# torch is installed in the version that constraints.txt pins, from one of two indexes:
#   TORCH_INDEX_URL empty   the default package index. Its builds include the CUDA
#                           libraries, which take several gigabytes.
#   TORCH_INDEX_URL set     an index of builds for one platform, in addition to the
#                           default one. Its builds have a local version ("+cpu"),
#                           which the pin accepts and pip prefers. For CPUs:
#                             docker build --build-arg TORCH_INDEX_URL=<index of CPU builds> .

FROM python:3.11-slim AS builder

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN python -m venv /opt/tolaria
ENV PATH="/opt/tolaria/bin:$PATH"
WORKDIR /build

# Large and rarely changed packages first, so that a change of the service does
# not download torch again.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --constraint constraints.txt torch

COPY pyproject.toml README.md ./
COPY service ./service
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --constraint constraints.txt .


FROM python:3.11-slim

LABEL org.opencontainers.image.title="Tolaria" \
      org.opencontainers.image.description="Trains a PyTorch model unattended; includes the reference peers." \
      org.opencontainers.image.version="0.1.0"

# The user id is fixed: containers that share a signal board must run as the same
# user, and volumes keep their owner when the image changes.
RUN groupadd --gid 10001 tolaria \
    && useradd --no-log-init --uid 10001 --gid tolaria --home-dir /var/lib/tolaria --shell /usr/sbin/nologin tolaria \
    && install --directory --owner=tolaria --group=tolaria --mode=0750 /var/lib/tolaria /etc/tolaria/secrets /etc/tolaria/ca

COPY --from=builder /opt/tolaria /opt/tolaria

# Loopback inside a container is not reachable from outside it: the metrics server
# listens on all interfaces, and the operator decides which ports to publish. The
# admin server stays on loopback, for `docker exec`, until it has certificates and
# tokens: docker-compose.yml makes them, docs/security.md explains them.
ENV PATH="/opt/tolaria/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    TOLARIA_METRICS__LISTEN=0.0.0.0:9464

# A number, so that a cluster can verify that it is not root.
USER 10001:10001

# The state directory is created here, and a tolaria.toml mounted here is read.
WORKDIR /var/lib/tolaria

EXPOSE 50051 9464

# The start imports torch, which takes seconds on a cold disk. A proxy from the
# environment must not be used for the container's own loopback.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:9464/livez', timeout=3)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["tolaria"]
CMD ["serve"]
