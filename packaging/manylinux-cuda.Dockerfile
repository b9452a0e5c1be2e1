# The image that packaging/cuda12.toml builds wheels in: manylinux_2_28 with a CUDA toolkit.
#   docker build -f packaging/manylinux-cuda.Dockerfile --build-arg MANYLINUX=<the image that
#     cibuildwheel takes for manylinux_2_28> -t eet-manylinux-cuda:12 packaging
ARG CUDA=12.9.1
ARG MANYLINUX
FROM nvidia/cuda:${CUDA}-devel-rockylinux8 AS toolkit
FROM ${MANYLINUX}
COPY --from=toolkit /usr/local/cuda /usr/local/cuda
ENV PATH=/usr/local/cuda/bin:$PATH
