"""What OpenAI's embeddings API says: a request checked, an answer written, an error in its format."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import orjson
from fastapi import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainValidator

__all__ = ["ApiError", "EmbeddingRequest", "ErrorAnswer", "Input", "as_json", "embeddings_json"]

MAX_INPUTS = 2048  # OpenAI's own limit

Input: TypeAlias = str | Sequence[int]


class ApiError(Exception):
    """An error for the client, in OpenAI's terms."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> Response:
        """The HTTP answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return as_json({"error": error}, self.status, self.headers)


class Error(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 2xx."""

    error: Error


def _inputs(value: Any) -> list[Input]:
    """One input or many, as a list. By hand: a union of lists would tell of every wrong item in four ways."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if _are_ids(value):
        value = [value]
    if len(value) > MAX_INPUTS:
        raise ValueError(f"has {len(value):,} items; the limit is {MAX_INPUTS:,}")
    for index, item in enumerate(value):
        if isinstance(item, str) == isinstance(value[0], str) and (isinstance(item, str) or _are_ids(item)):
            if not item:
                raise ValueError(f"item {index} is empty")
            continue
        raise ValueError(f"item {index} is not what the others are: all strings, or all lists of token ids")
    return list(value)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # a bool is an int to isinstance


class EmbeddingRequest(BaseModel):
    """A request for embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="A name that /v1/models gives; NAME:query stands for input_type query.")
    input: Annotated[
        list[Input],
        PlainValidator(_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ] = Field(description=f"One text, or up to {MAX_INPUTS:,}; or texts as ids of the model's own tokenizer.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32. Default: float."
    )
    dimensions: int | None = Field(None, ge=1, description="Keep the best ones, if the model's method orders them.")
    input_type: Literal["query", "document"] | None = Field(None, description="Which template. Default: document.")
    truncate: bool | None = Field(None, description="Cut texts that are too long, and say so; else they are refused.")
    user: str | None = Field(None, description="Ignored.")


def embeddings_json(
    model: str, vectors: NDArray[np.float32], encoding_format: str | None, tokens: int, tokens_cut: Sequence[int]
) -> Response:
    """The answer for (n, dim) vectors; an item whose text was cut has `tokens_cut`."""
    data = []
    for index, (vector, cut) in enumerate(zip(vectors, tokens_cut, strict=True)):
        base64_vector = encoding_format == "base64"
        embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode() if base64_vector else vector
        data.append(
            {"object": "embedding", "index": index, "embedding": embedding} | ({"tokens_cut": cut} if cut else {})
        )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return as_json({"object": "list", "data": data, "model": model, "usage": usage})


def as_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; float32 arrays are written in the fewest digits that read back the same."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers, "application/json")
