# docker build -t solo-ext .                 PyTorch with CUDA, and DALI
# docker build -t solo-ext --target cpu .    PyTorch for CPUs
ARG BASE=python:3.12-slim
ARG EXTRAS=detect,features,h5,onnx,tiff,viz

FROM ${BASE} AS base
# for users whom the image does not know: docker run -u
ENV HOME=/tmp USER=solo PATH=/opt/solo-ext/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/solo-ext && mkdir -m 777 /work
WORKDIR /work
ENTRYPOINT ["solo-ext"]
CMD ["--help"]

FROM base AS wheel
COPY . /src
RUN pip wheel --no-deps -w /wheel /src

FROM base AS cpu
ARG EXTRAS
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install "$(ls /wheel/*)[$EXTRAS]"

FROM base AS cuda
ARG EXTRAS
RUN pip install torch torchvision
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install "$(ls /wheel/*)[$EXTRAS,dali-cuda13]"
