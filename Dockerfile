# docker build -t solo-ext .                 PyTorch with CUDA, and DALI
# docker build -t solo-ext --target cpu .    PyTorch for CPUs
# docker run --rm --gpus all --shm-size 8g -u $(id -u):$(id -g) -v "$PWD":/work solo-ext doctor
ARG BASE=python:3.12-slim

FROM ${BASE} AS base
ARG EXTRAS=detect,features,h5,onnx,viz
# for users whom the image does not know: docker run -u
ENV HOME=/tmp USER=solo PATH=/opt/solo-ext/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/solo-ext && mkdir -m 777 /work
WORKDIR /work
ENTRYPOINT ["solo-ext"]
CMD ["--help"]

FROM base AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
RUN --mount=type=bind,target=/src,rw pip install "/src[$EXTRAS]"

FROM base AS cuda
RUN pip install torch torchvision
RUN --mount=type=bind,target=/src,rw pip install "/src[$EXTRAS,dali-cuda13]"
