# One image for frontends, workers and tools: docker run reckon COMMAND, as `reckon COMMAND`.
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/reckon

# What we depend on changes seldom: a layer of its own, below the code.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > dependencies.txt \
 && pip install -r dependencies.txt

COPY . ./
RUN pip install --no-deps .

# Volumes that are mounted on these for the first time take over their owner.
RUN useradd --uid 10001 --no-create-home reckon \
 && mkdir -p /recordings /secrets/nats /secrets/frontend /secrets/worker /secrets/recorder /secrets/operator \
 && chown -R reckon: /recordings /secrets
USER reckon
ENTRYPOINT ["reckon"]
CMD ["--help"]
