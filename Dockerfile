# kvembed serve. With PyTorch's index of CPU builds as TORCH_INDEX, the image is gigabytes smaller.
FROM python:3.11-slim
ARG TORCH_INDEX=""
WORKDIR /app
COPY constraints.txt ./
# torch in a layer of its own, which a change in the code leaves as it is. Without its dependencies, which come with the
# rest: PyTorch's index has some of them in versions other than the constraints'.
RUN pip install --no-cache-dir --no-deps --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[server]'
# By number, so that Kubernetes can tell that it is not root.
RUN useradd --uid 10001 --create-home kvembed && mkdir /cache && chown kvembed /cache
USER 10001
ENV HOME=/home/kvembed KVEMBED_CACHE=/cache HF_HOME=/cache/hub
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads and converts the model before the port opens.
HEALTHCHECK --start-period=300s --timeout=10s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
# `exec` form, so that signals reach the server and it finishes what it took.
ENTRYPOINT ["kvembed", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]
