"""What objectives read of a model: its towers' outputs for a batch, and its other parts as functions of them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from mmjax.models.multimodal import MultimodalModel, Text


class Vocabulary(NamedTuple):
    """What masked language modelling has to know of the tokenizer.

    `starts` and `ends` mark the tokens that begin a word or end one: a token also begins a word if the one before ends
    one. `special` tokens (padding, start, end, ...) are never masked.
    """

    mask_id: int
    starts: Bool[np.ndarray, " vocab"]
    ends: Bool[np.ndarray, " vocab"]
    special: Bool[np.ndarray, " vocab"]


class Outputs(Mapping[str, Any]):
    """A tower's outputs by modality (see `MultimodalModel.encode`), `logit_scale`, `logit_bias`, and with a teacher
    `teacher`: the same of another model, without a gradient.

    A modality's tower runs when it is first asked for, and once.
    """

    def __init__(
        self,
        module: MultimodalModel,
        params: PyTree,
        batch: Mapping[str, Array],
        known: Mapping[str, Any] | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        """`known` holds what has been computed already."""
        self._module, self._params, self._batch, self.vocabulary = module, params, batch, vocabulary
        self._known = dict(known or {})
        self._modalities = [name for name in module.config["encoders"] if name in module.parts and name in batch]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._modalities, "logit_scale", "logit_bias", *self._known)))

    def __len__(self) -> int:
        return len([*self])

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            if name in ("logit_scale", "logit_bias"):
                self._known |= self._apply("logits")
            elif name in self._modalities:
                self._known[name] = self._apply("encode", name, self._batch[name], self._batch.get("rng"))
            else:
                raise KeyError(name)
        return self._known[name]

    def _apply(self, method: str, *arguments: Any) -> Any:
        return self._module.apply({"params": self._params}, *arguments, method=method)

    @property
    def text(self) -> Text:
        """The batch's texts, for the functions below; with the tower's tokens where that is part of the model."""
        ids = self._batch["text"]
        if "text" in self._modalities:
            return Text(ids, self["text"]["tokens"], self["text"]["valid"])
        return Text(ids, None, ids != self.pad_id)

    def read(self, ids: Int[Array, "batch length"]) -> Text:
        """Other texts than the batch's; none of their tokens are dropped."""
        tokens, valid = self._apply("tokens", "text", ids)
        return Text(ids, tokens, valid)

    def match(self, text: Text, image: Float[Array, "batch tokens embed"]) -> Float[Array, "batch 2"]:
        """See `MultimodalModel.match`."""
        return self._apply("match", text, image)

    def predict(
        self, text: Text, image: Float[Array, "batch tokens embed"] | None
    ) -> Float[Array, "batch tokens vocab"]:
        """See `MultimodalModel.predict`."""
        return self._apply("predict", text, image)

    def caption(
        self, text: Text, image: Float[Array, "batch tokens embed"], parallel: Bool[Array, " batch"] | None = None
    ) -> Float[Array, "batch slots vocab"]:
        """See `MultimodalModel.caption`."""
        return self._apply("caption", text, image, parallel)

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self._module.config["encoders"]["text"]["pad_id"]
