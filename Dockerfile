# kvembed serve. With PyTorch's index of CPU builds as TORCH_INDEX, the image is gigabytes smaller.
FROM python:3.11-slim
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
COPY constraints.txt ./
# torch in a layer of its own, which a change in the code leaves as it is. Without its dependencies, which come with the
# rest: PyTorch's index has some of them in versions other than the constraints'.
RUN pip install --no-deps --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --constraint constraints.txt '.[server]'
# By number, so that Kubernetes can tell that it is not root. The cache is also group 0's, as which OpenShift runs users
# of its own.
RUN useradd --uid 10001 --create-home kvembed && install --directory --owner=10001 --group=0 --mode=2775 /cache
USER 10001
ENV HOME=/home/kvembed KVEMBED_CACHE=/cache HF_HOME=/cache/hub
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads and converts the model before the port opens. urllib would send this through a proxy, if the
# environment names one.
HEALTHCHECK --start-period=300s --timeout=10s \
  CMD ["python", "-c", "from http.client import *; c = HTTPConnection('127.0.0.1', 8000, timeout=5); c.request('GET', '/ready'); exit(c.getresponse().status != 200)"]
# `exec` form, so that signals reach the server and it finishes what it took.
ENTRYPOINT ["kvembed", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]
