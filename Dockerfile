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
#                           which the pin accepts and pip prefers. docker-compose.yml
#                           sets the one for CPUs.
#
# deploy/build-image builds it with whatever engine is there. A secret named "pip" is
# pip's configuration in the build, for a machine with indexes of its own network.

ARG BASE_IMAGE=python:3.11-slim

# -- the environment: all but the service itself, rarely changed and large parts first --
FROM ${BASE_IMAGE} AS environment

# An init as process 1, which reaps what a killed lane leaves behind: process 1 cannot be
# killed from inside its container, not even by the sentinel when it hangs.
# The user id is fixed: containers that share a signal board must run as the same
# user, and volumes keep their owner when the image changes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tolaria \
    && useradd --no-log-init --uid 10001 --gid tolaria --home-dir /var/lib/tolaria --shell /usr/sbin/nologin tolaria \
    && install --directory --owner=tolaria --group=tolaria --mode=0750 /var/lib/tolaria \
    && python -m venv /opt/tolaria

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH="/opt/service/bin:/opt/tolaria/bin:$PATH"
WORKDIR /opt/build

COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --constraint constraints.txt torch

# The path on which the service is found is part of the environment.
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} --constraint constraints.txt --requirement requirements.txt \
    && echo /opt/service > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/service.pth"


# -- the service: a change of its code rebuilds only this, without a download ------------
FROM environment AS service

RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/tools \
    && /opt/tools/bin/pip install --constraint constraints.txt cyclonedx-bom setuptools \
    && mkdir /opt/service \
    && /opt/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-format JSON \
        --output-file /opt/service/sbom.cdx.json /opt/tolaria/bin/python

COPY README.md ./
COPY service ./service
RUN PYTHONPATH="$(/opt/tools/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    pip install --no-deps --no-index --no-build-isolation --target /opt/service .


# -- the image: nothing large is copied into it ------------------------------------------
FROM environment

LABEL org.opencontainers.image.title="Tolaria" \
      org.opencontainers.image.description="Trains a PyTorch model unattended; includes the reference peers." \
      org.opencontainers.image.version="0.2.0.dev0"

COPY --from=service /opt/service /opt/service

# Loopback inside a container is not reachable from outside it: the metrics server
# listens on all interfaces, and the operator decides which ports to publish. The
# admin server stays on loopback, for `docker exec`, until it has certificates and
# tokens: docker-compose.yml makes them, docs/security.md explains them.
ENV PYTHONUNBUFFERED=1 \
    TOLARIA_METRICS__LISTEN=0.0.0.0:9464

# A number, so that a cluster can verify that it is not root.
USER 10001:10001

# The state directory is created here, and a tolaria.toml mounted here is read. The rest
# of the root file system can be read-only, with a /tmp in memory.
WORKDIR /var/lib/tolaria

EXPOSE 50051 9464

# The admin service serves in every state of the run: a halted run is not to be restarted.
# The start imports torch, which takes seconds on a cold disk.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "tolaria.probe", "127.0.0.1:50051", "leyline.v1.TolariaAdminService"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "-s", "--", "tolaria"]
CMD ["serve"]
