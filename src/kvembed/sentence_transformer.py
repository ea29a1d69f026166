"""A saved embedder inside sentence-transformers, which opens it with `trust_remote_code`, as any class not its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .config import Role
from .embedder import Embedder
from .errors import InputError
from .extras import import_extra
from .prompts import UNLIMITED
from .saved import save_embedder

__all__ = ["EmbedderModule"]

logger = logging.getLogger(__name__)

InputModule: Any = import_extra("sentence_transformers.base.modules", "st").InputModule


class EmbedderModule(InputModule):  # type: ignore[misc]
    """An `Embedder` as the one module of a `SentenceTransformer`: texts to unit vectors, float32.

    `encode` and `encode_document` give `Embedder.encode_document`'s vectors, `encode_query` those of
    `Embedder.encode_query`. Texts are rendered in the embedder's templates and never go through a chat template.

    Args:
        embedder: ours; its model is moved and cast as the `SentenceTransformer` is.

    Attributes:
        model: the embedder's language model, so that sentence-transformers finds its weights.
    """

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder = embedder
        self.model = embedder.model

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        backend: str = "torch",
        **place: Any,
    ) -> EmbedderModule:
        """Open a folder of `Embedder.save_pretrained`; sentence-transformers calls this.

        Args:
            model_name_or_path: the folder, or a hub id of one.
            subfolder: of it.
            model_kwargs: arguments of `Embedder.from_pretrained`. `dtype` may be torch's own; without it, or with
                `"auto"`, it is the one that the folder was saved in, as everywhere in sentence-transformers.
            processor_kwargs, config_kwargs: must be empty.
            backend: must be `"torch"`.
            place: token, cache_folder, revision and local_files_only, for a hub id; the rest is not used.

        Raises:
            InputError: an argument that can't be followed.
            ModelNotFound: as `Embedder.from_pretrained`.
        """
        if backend != "torch":
            raise InputError(
                f"backend {backend!r}: re-routing needs the attention of transformers itself, so only torch"
            )
        if processor_kwargs or config_kwargs:
            raise InputError("a kvembed folder takes neither processor_kwargs nor config_kwargs; see model_kwargs")
        hub = {name: place.get(name) for name in ("token", "cache_folder", "revision")}
        folder = cls.load_dir_path(
            model_name_or_path, subfolder, local_files_only=place.get("local_files_only", False), **hub
        )
        options = dict(model_kwargs or {})
        dtype = options.pop("torch_dtype", None)
        dtype = options.pop("dtype", None) or dtype or "auto"
        if dtype == "auto":
            dtype = json.loads((Path(folder) / "config.json").read_text()).get("dtype", "auto")
        # On the CPU at first: only after this does sentence-transformers move it to the device that it was told.
        options = {"device": "cpu"} | options
        return cls(Embedder.from_pretrained(folder, dtype=dtype, **options))

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Write all that `load` reads; sentence-transformers adds its own files. Raises `InputError` for pickles."""
        if not safe_serialization:
            raise InputError("weights are saved as safetensors only: leave out safe_serialization=False")
        save_embedder(output_path, self.embedder)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        task: str | None = None,
        processing_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Render and tokenise. Texts that are too long are cut, and a warning says how many.

        Args:
            inputs: strings.
            prompt: `"query"`, `"document"` or None; the first two are also the names of the saved prompts.
            task: what `encode_query` and `encode_document` say; counts where there is no prompt.
            processing_kwargs: must be empty.

        Returns:
            `prompts` (those of `Embedder.prompts`) and `role`, which `forward` takes; and empty `input_ids`, a name by
            which sentence-transformers' trainer knows what belongs to a column.

        Raises:
            InputError: another prompt; an input that is not a string or not valid Unicode.
        """
        if processing_kwargs:
            raise InputError("a kvembed folder takes no processing_kwargs; set max_seq_length to cut texts shorter")
        for text in inputs:
            if not isinstance(text, str):
                raise InputError(f"an input is a {type(text).__name__}, not a string")
        role = _role(prompt, task)
        try:
            prompts = self.embedder.prompts(inputs, role=role)
        except InputError as error:  # its number is not the caller's
            raise InputError(f"in a batch, longest texts first: {error}") from None
        if cut := sum(any(one.tokens_cut for one in rendered) for rendered in prompts):
            logger.warning("%d of %d texts were cut to %d tokens", cut, len(prompts), self.embedder.max_tokens)
        return {"prompts": prompts, "role": role, "input_ids": torch.zeros(len(prompts), 1, dtype=torch.long)}

    def train(self, mode: bool = True) -> EmbedderModule:
        """The model is frozen and stays as it is, whatever is trained on top of it."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of what is compiled in one piece
    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """What `preprocess` gave -> `sentence_embedding` (n,dim) float32, `token_counts`, `tokens_cut` (n,) int64."""
        encoded = self.embedder.encode_prompts(features["prompts"], role=features["role"])
        found = {
            "sentence_embedding": encoded.vectors,
            "token_counts": encoded.token_counts,
            "tokens_cut": encoded.tokens_cut,
        }
        return {name: torch.from_numpy(array).to(self.embedder.backbone.device) for name, array in found.items()}

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.embedder.dim

    @property
    def tokenizer(self) -> Any:
        """The embedder's, to count tokens with; it can't be replaced."""
        return self.embedder.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """The longest prompt in tokens, template included; longer texts are cut, with a warning. None: no limit."""
        return self.embedder.max_tokens if self.embedder.max_tokens < UNLIMITED else None

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.embedder = self.embedder.replace(max_tokens=value)

    def get_config_dict(self) -> dict[str, Any]:
        """For people: what `repr` shows."""
        config = self.embedder.config
        return {"method": config.method, "config": config.hash(), "max_seq_length": self.max_seq_length}


def _role(prompt: str | None, task: str | None) -> Role:
    roles: tuple[Literal["document", "query"], ...] = get_args(Role)
    for role in roles:
        # An empty prompt says nothing: `encode_query` gives it where the saved prompts were blanked, beside its task.
        if prompt == role or (not prompt and task == role):
            return role
    if prompt is None and task is None:
        return "document"
    raise InputError(
        f"prompt is {prompt!r}, but this model's prompts only name a role: 'query' or 'document'. "
        "Templates are part of the saved folder, and an instruction of your own can be part of the text"
    )
