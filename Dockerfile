# kvembed serve. With PyTorch's index of CPU builds as TORCH_INDEX, the image is gigabytes smaller.
FROM python:3.11-slim
ARG TORCH_INDEX=""
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url $TORCH_INDEX} torch \
 && pip install --no-cache-dir --constraint constraints.txt '.[server]'
RUN useradd --create-home kvembed && mkdir /cache && chown kvembed /cache
USER kvembed
ENV KVEMBED_CACHE=/cache HF_HOME=/cache/hub
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# `exec` form, so that signals reach the server and it finishes what it took.
ENTRYPOINT ["kvembed", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]
