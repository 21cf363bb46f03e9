# docker build -t elr .
# docker run --gpus all --shm-size 8g --user "$(id -u):$(id -g)" \
#     -v "$PWD:/work" -v "/path/to/images:/data:ro" -v elr-cache:/cache elr train /data

FROM python:3.11-slim AS build
WORKDIR /source
# What it needs, in a file that stays the same when only the code changes.
COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = project['optional-dependencies']; \
    print(*project['dependencies'], *extras['onnx'], *extras['parquet'], *extras['tensorboard'], sep='\n')" \
    > /requirements.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# A slim Python image is enough: the torch wheel brings its own CUDA libraries,
# and the driver comes from the host through `--gpus all`.
FROM python:3.11-slim
# `--compile` builds kernels at run time: for a GPU with the C compiler, for the CPU with that of C++.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /requirements.txt /requirements.txt
RUN pip install --no-cache-dir --requirement /requirements.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl && pip check && rm -r /wheels

# Everything that is written outside the work folder goes to /cache. It is open to every
# user id, so that `--user` can hand the run folder to the person who called.
RUN useradd --create-home --uid 1000 elr \
    && mkdir /cache /work && chmod 1777 /cache && chown elr /work
ENV HOME=/cache \
    USER=elr \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib \
    NO_ALBUMENTATIONS_UPDATE=1 \
    PYTHONUNBUFFERED=1
VOLUME /cache
WORKDIR /work
USER elr
ENTRYPOINT ["elr"]
