"""The server on Ray Serve: `serve run kvembed.serve_ray:app model=smollm2 replicas=2`.

Every replica has its own model and its own queue, and is the same application as `kvembed serve`; Ray Serve shares the
requests out, watches over the replicas and makes new ones.
"""

# No postponed annotations: Ray Serve looks at the builder's own to check its arguments.
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from .embedder import Embedder
from .errors import KvembedError
from .extras import import_extra
from .models import label
from .options import loader
from .server import api_keys, create_app
from .service import Limits

__all__ = ["Arguments", "app"]

serve: Any = import_extra("ray.serve", "ray-serve")

GRACE_SECONDS = 120.0  # a replica that is taken away answers what it has


class Arguments(BaseModel):
    """What `serve run` takes as `name=value`; those that `kvembed serve` has too mean the same there."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("smollm2", min_length=1)
    name: str | None = Field(None, description="What clients call it. Default: its own.")
    method: str | None = None
    layers: str | None = None
    bias: float | None = None
    dtype: str = "auto"
    dim: int | None = None
    fitted: Path | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    queue_tokens: int = Field(Limits.queue_tokens, ge=1, description="That may wait, in each replica.")
    keys: Path | None = None
    replicas: int | Literal["auto"] = 1
    cpus: float = Field(1, gt=0, description="Of a replica; also the threads that its model takes.")
    gpus: float = Field(0, ge=0, description="Of a replica.")

    def embedder(self) -> Embedder:
        """Load the model."""
        options = self.model_dump(
            include={"method", "layers", "bias", "dtype", "dim", "fitted", "max_tokens", "batch_tokens"}
        )
        return loader(self.model, **options)()


class Replica:
    """A model of its own, behind the application of `kvembed serve`."""

    def __init__(self, arguments: Arguments, keys: list[str]) -> None:
        self._embedder = arguments.embedder()
        self._names = [arguments.name or label(arguments.model)]
        self._keys, self._limits = keys, Limits(queue_tokens=arguments.queue_tokens)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's question for the application."""
        self._app = create_app(self._embedder, self._names, keys=self._keys, limits=self._limits)
        return self._app

    def check_health(self) -> None:
        """Ray Serve's question, every few seconds, whether this replica must be replaced: as /ready answers."""
        if not self._app.state.service.batcher.running:
            raise KvembedError("no batches are being taken")


def app(arguments: Arguments) -> Any:
    """The Ray Serve application. Keys are read here, once, so that no replica is open that should not be.

    Raises:
        InputError: the file of keys can't be read.
    """
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="kvembed",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        max_ongoing_requests=Limits.requests,  # the replica itself answers 429, by tokens
        graceful_shutdown_timeout_s=GRACE_SECONDS,
    )
    return deployment.bind(arguments, api_keys(arguments.keys))
