# The project with CUDA, in the versions that the tests have passed with.
#
#     docker build --tag minilmv2-deepspeed:0.1.0 .
#     docker run --gpus all --ipc host --volume "$PWD/data:/data" minilmv2-deepspeed:0.1.0 distill --recipe demo
#
# The toolkit (`devel`) is there because DeepSpeed compiles its own operators where they are first used. Its version is that
# of the CUDA libraries that come with the torch of constraints.txt.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# ssh and pdsh are what `--hostfile` starts other machines with; libaio and ninja are for weights on NVMe
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ libaio-dev ninja-build openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY constraints.txt /opt/minilm/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint /opt/minilm/constraints.txt torch deepspeed transformers

COPY . /opt/minilm
RUN pip install --no-cache-dir --constraint /opt/minilm/constraints.txt --editable /opt/minilm

# samples, demo runs and all that recipes call ${MINILM_HOME} lie on the volume; nothing else is written but the user's cache
ENV MINILM_HOME=/data HOME=/home/ubuntu
RUN mkdir /data && chown 1000:1000 /data
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["minilm"]
CMD ["--help"]
