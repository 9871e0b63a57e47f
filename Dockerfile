# A server of trimmed folders: no torch, no exporter. Mount the folders at /models:
#   docker build -t trimserve . && docker run -p 8000:8000 -v "$PWD/qwen3-tickets:/models/qwen3-tickets:ro" trimserve
FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY trimserve ./trimserve
COPY export ./export
RUN python -m venv /opt/trimserve \
    && /opt/trimserve/bin/pip install --no-cache-dir '.[cpu,serve,grammar]'

FROM python:3.13-slim
COPY --from=build /opt/trimserve /opt/trimserve
RUN useradd --create-home --uid 10001 trimserve
USER trimserve
ENV PATH=/opt/trimserve/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
# SIGTERM drains: let `docker stop --time` be longer than --shutdown-timeout.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')"]
ENTRYPOINT ["sh", "-c", "exec trimserve serve --host 0.0.0.0 \"$@\" /models/*/", "serve"]
