"""A model in use: encoding images, texts and recordings, comparing them, captioning."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from mmjax import language, speech
from mmjax.building import make_module
from mmjax.data import image as image_ops
from mmjax.data import text as tokenizers
from mmjax.data.image_reader import Reader
from mmjax.errors import UserError
from mmjax.models.flops import patch_count
from mmjax.models.generate import Strategy, generate, make_strategy
from mmjax.models.multimodal import Text, ignores_padding, output_width, positions_of
from mmjax.objectives.captioning import labels_of
from mmjax.sharding import distributed
from mmjax.sharding.rules import batch_sharding, constrain

Embeddings = Float[np.ndarray, "rows embed_dim"]
Embedding = Float[np.ndarray, " embed_dim"]
LoadRows = Callable[[np.ndarray], PyTree[np.ndarray]]  # row numbers -> their inputs
BATCH_SIZE = 256
SHORTEST = 8  # tokens of a batch of texts


class Model:
    """A model with its parameters and tokenizer. Embeddings are float32 of unit norm."""

    def __init__(
        self,
        config: ConfigDict,
        params: PyTree,
        tokenizer: tokenizers.Tokenizer | None,
        mesh: Mesh,
        step: int = 0,
        on_batch: Callable[[], None] = lambda: None,
    ):
        """`step` is that of the parameters; `on_batch` is called after each batch that is encoded."""
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.step, self._on_batch = step, on_batch
        self.module = module = make_module(config)

        def encode(params: PyTree, inputs: jax.Array, modality: str, output: str) -> jax.Array:
            return module.apply({"params": params}, modality, inputs, method="features")[output].astype(np.float32)

        def tokens(params: PyTree, inputs: jax.Array, modality: str) -> tuple:
            return module.apply({"params": params}, modality, inputs, method="tokens")

        def match(params: PyTree, batch: dict[str, jax.Array], images: jax.Array) -> jax.Array:
            text = Text(batch["text"], *tokens(params, batch["text"], "text"))
            image = constrain(images[batch["place"]], "batch", None, "embed")
            logits = module.apply({"params": params}, text, image, method="match")
            return logits[:, 1] - logits[:, 0]

        def caption(params: PyTree, batch: dict[str, jax.Array], seed: int, strategy: Strategy) -> tuple:
            image, _ = tokens(params, batch["image"], "image")
            prompt, end_id = (batch["prompt"], batch["prompt_length"]), self.tokenizer.end_id
            rng = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch["row"])
            return generate(module, params, image, *prompt, rng, end_id, strategy)

        def caption_likelihood(params: PyTree, batch: dict[str, jax.Array], images: jax.Array) -> jax.Array:
            ids, image = batch["text"], constrain(images[batch["place"]], "batch", None, "embed")
            read = tokens(params, ids, "text") if config.model.decoder.reads == "text" else (None, None)
            logits = module.apply({"params": params}, Text(ids, *read), image, method="caption")
            labels, counted = labels_of(ids, logits, config.model.encoders.text.pad_id)
            own = jax.numpy.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            found = jax.numpy.where(counted, own - jax.nn.logsumexp(logits, axis=-1), 0)
            return jax.numpy.pad(found, ((0, 0), (ids.shape[1] - labels.shape[1], 0)))

        def of_image(params: PyTree, batch: dict[str, jax.Array], method: str) -> jax.Array:
            image, _ = module.apply({"params": params}, "image", **batch, method="tokens")
            return module.apply({"params": params}, image, method=method)

        replicated = NamedSharding(mesh, P())
        self._encode = jax.jit(encode, static_argnames=("modality", "output"), out_shardings=replicated)
        self._tokens = jax.jit(tokens, static_argnames="modality")
        self._match = jax.jit(match, out_shardings=replicated)
        self._caption = jax.jit(caption, static_argnames="strategy", out_shardings=replicated)
        self._caption_likelihood = jax.jit(caption_likelihood, out_shardings=replicated)
        self._of_image = jax.jit(of_image, static_argnames="method", out_shardings=replicated)
        self._logits = jax.jit(lambda params: module.apply({"params": params}, method="logits"))

    def with_params(self, params: PyTree, step: int) -> "Model":
        """The same model, its compiled functions included, with the parameters of another step."""
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, params=params, step=step)
        return other

    def encode_image(self, images: Any) -> Embeddings | Embedding:
        """Encodes file paths, PIL images, or uint8 arrays [height, width, 3] of any size; several, or one of them.

        Raises:
          UserError: a file is missing or is no image, or an array has another shape or type; or the model reads none.
        """
        if image_ops.is_one(images):
            return self.encode_image([images])[0]
        return self.encode_rows("image", len(images), self._loader(images))

    def _loader(self, images: Sequence[Any]) -> LoadRows:
        self.needs("image", "read images")
        reader = Reader.of(self.config.model.encoders.image)
        return lambda indices: reader(image_ops.pixels_of(images[index]) for index in indices)

    def encode_text(self, texts: str | Sequence[str]) -> Embeddings | Embedding:
        """Encodes texts of any length and language, several or one; what exceeds the model's length is cut off.

        Raises:
          UserError: the model reads no texts, or came without a tokenizer.
        """
        self.needs("text", "encode texts")
        if isinstance(texts, str):
            return self.encode_text([texts])[0]
        ids = self.without_padding(self.token_ids(texts))
        return self.encode_rows("text", len(texts), lambda indices: ids[indices])

    def without_padding(self, ids: Int[np.ndarray, "texts length"]) -> Int[np.ndarray, "texts shorter"]:
        """Ids cut to the next power of two that holds every text, where the tower makes the same of them."""
        encoder = self.config.model.encoders.text
        if not ignores_padding(encoder):
            return ids
        if encoder.causal and encoder.pooling == "eos":
            ends = ids == encoder.end_id
            used = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, ids.shape[1])
        else:
            used = np.where(ids != encoder.pad_id, np.arange(1, ids.shape[1] + 1), 0).max(axis=1, initial=0)
        return ids[:, : max(SHORTEST, _power_of_two(used.max(initial=1)))]

    def token_ids(self, texts: Sequence[str]) -> Int[np.ndarray, "texts length"]:
        """The ids that the text tower reads.

        Raises:
          UserError: the model came without a tokenizer.
        """
        return self._known_tokenizer().encode(list(texts), self.config.model.encoders.text.length)

    def _known_tokenizer(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "this model came without a tokenizer, so it can read ids alone: put its tokenizer.json (of open_clip's "
                "models: bpe_simple_vocab_16e6.txt.gz) beside its weights"
            )
        return self.tokenizer

    def similarity(
        self, image_embeddings: Embeddings | Embedding, text_embeddings: Embeddings | Embedding
    ) -> Float[np.ndarray, "images texts"]:
        """Probabilities, as the model's objective defines them.

        A model trained with the sigmoid loss gives each pair its own; one trained with softmax gives
        each image a distribution over the texts.
        """
        learned = self.logits()
        logits = learned["logit_scale"] * (np.atleast_2d(image_embeddings) @ np.atleast_2d(text_embeddings).T)
        if "sigmoid" in [entry.kind for entry in self.config.objectives.values()]:
            return 1 / (1 + np.exp(-(logits + learned["logit_bias"])))
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def agreed(self, array: np.ndarray) -> np.ndarray:
        """What the first of several processes has in place of this array, of the same shape and type in all of them.

        For what evaluators decide on their hosts, which may round differently, before they ask the model again.
        """
        return distributed.array_from_first_process(array)

    def logits(self) -> dict[str, float]:
        """`logit_scale` and `logit_bias`: what makes logits of cosines."""
        with jax.set_mesh(self.mesh):
            return {name: float(value) for name, value in jax.device_get(self._logits(self.params)).items()}

    def match(self, images: Any, texts: str | Sequence[str]) -> Float[np.ndarray, " pairs"] | float:
        """The probability, by the matching head, that text i belongs to image i; or of one pair.

        Raises:
          UserError: the model was not trained to match; otherwise as `encode_image`.
        """
        if image_ops.is_one(images) and isinstance(texts, str):
            return float(self.match([images], [texts])[0])
        if image_ops.is_one(images) or isinstance(texts, str):
            raise UserError("one image goes with one text, and several with as many")
        if len(images) != len(texts):
            raise UserError(f"{len(images)} images and {len(texts)} texts are no pairs")
        self.needs("matching", "match images and texts")
        ids, rows = self.token_ids(texts), np.arange(len(images))
        if self.config.model.fusion.pooling != "last":
            ids = self.without_padding(ids)
        return 1 / (1 + np.exp(-self.match_rows(rows, rows, self._loader(images), lambda rows: ids[rows])))

    def match_rows(
        self,
        images: Int[np.ndarray, " pairs"],
        texts: Int[np.ndarray, " pairs"],
        load_images: LoadRows,
        load_texts: LoadRows,
        batch_size: int = BATCH_SIZE,
    ) -> Float[np.ndarray, " pairs"]:
        """The log-odds of `match` for pairs of an image row and a text row; an image is encoded once for all its pairs.

        The loaders give pixels and token ids, as in `encode_rows`; `batch_size` is that of images, and of pairs.
        """
        self.needs("matching", "match images and texts")
        return self._of_pairs(self._match, (), images, texts, load_images, load_texts, batch_size)

    def _of_pairs(
        self,
        run: Callable[..., jax.Array],
        shape: tuple[int, ...],
        images: np.ndarray,
        texts: np.ndarray,
        load_images: LoadRows,
        load_texts: LoadRows,
        batch_size: int,
    ) -> np.ndarray:
        """What `run(params, batch, images)` returns for pairs, of this shape for each; `batch` has texts and the places
        of their images among the `images`, the tokens of a batch of these.
        """
        found, distinct = np.zeros((len(images), *shape), np.float32), np.unique(images)
        loaders = {"image": lambda rows: load_images(distinct[rows])}
        for block, batch in self._placed(len(distinct), loaders, batch_size):
            with jax.set_mesh(self.mesh):
                tokens, _ = self._tokens(self.params, batch["image"], modality="image")
            own = np.flatnonzero(np.isin(images, distinct[block]))
            found[own] = self._of_encoded(
                partial(run, images=tokens),
                np.searchsorted(distinct[block], images[own]),
                texts[own],
                load_texts,
                batch_size,
            )
        return found

    def _of_encoded(
        self,
        run: Callable[..., jax.Array],
        places: np.ndarray,
        texts: np.ndarray,
        load_texts: LoadRows,
        batch_size: int,
    ) -> np.ndarray:
        """What `run` returns for the images whose tokens stand at these places, each with a text."""
        loaders = {"place": lambda rows: places[rows], "text": lambda rows: load_texts(texts[rows])}
        return np.concatenate([*self.batches(run, len(places), loaders, batch_size)])

    def caption(
        self, images: Any, prompts: str | Sequence[str] | None = None, seed: int = 0, **strategy: Any
    ) -> list[str] | str:
        """A text for each image; or for one image.

        Args:
          images: as in `encode_image`.
          prompts: what each text begins with, which is part of the result; one for one image.
          seed: of sampling.
          strategy: fields of `mmjax.models.generate.Strategy`: `beams` and `length_penalty`, or `temperature`, `top_k`
            and `top_p`; greedy by default. `max_new_tokens` is how many follow the prompt at most, the end token too;
            0 is the model's own choice. `suppress` and `suppress_first` go with all of them.

        Raises:
          UserError: the model was not trained to caption, an option is unknown or has no effect, the prompts are not as
            many as the images; otherwise as `encode_image`.
        """
        if image_ops.is_one(images):
            return self.caption([images], None if prompts is None else [prompts], seed, **strategy)[0]
        return self.caption_rows(len(images), self._loader(images), prompts, seed=seed, **strategy)

    def caption_rows(
        self,
        count: int,
        load_images: LoadRows,
        prompts: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
        **strategy: Any,
    ) -> list[str]:
        """`caption` for `count` images; the loader gives pixels, as in `encode_rows`."""
        self.needs("decoder", "caption images")
        self.needs("image", "read images")
        chosen = make_strategy(strategy, self.config.model.encoders.text.vocab_size)
        chosen = chosen._replace(max_new_tokens=chosen.max_new_tokens or self.config.model.decoder.max_new_tokens)
        if prompts is not None and len(prompts) != count:
            raise UserError(f"{count} images and {len(prompts)} prompts: give one for each, or none")
        ids, lengths = self._prompts(prompts or [""] * count, chosen.max_new_tokens)
        loaders = {"image": load_images, "prompt": lambda rows: ids[rows], "prompt_length": lambda rows: lengths[rows]}
        loaders["row"] = lambda rows: rows
        run = partial(self._caption, seed=seed, strategy=chosen)
        found = self.batches(run, count, loaders, batch_size)
        return [self.tokenizer.decode(row) for ids, _ in found for row in ids]

    def encode_audio(self, audios: Sequence[Any]) -> Embeddings:
        """Encodes recordings: see `transcribe`. What exceeds the model's length is cut off.

        Raises:
          UserError: the model's recordings share no space with images or texts; otherwise as `transcribe`.
        """
        self.needs("audio", "read recordings")
        self.needs_encoder("audio")
        load = speech.loader(self.config.model.encoders.audio, audios)
        return self.encode_rows("audio", len(audios), load, speech.BATCH_SIZE)

    def transcribe(
        self,
        audios: Sequence[Any],
        language: str | None = None,
        task: str = "transcribe",
        batch_size: int = speech.BATCH_SIZE,
        seed: int = 0,
        **strategy: Any,
    ) -> list[str]:
        """What is said in recordings, as text.

        A recording is cut into windows of the model's length (30 seconds), which are transcribed each on its own,
        without timestamps: a word that a cut divides can get lost.

        Args:
          audios: file paths, float arrays [samples] within -1..1 at the model's rate, or pairs (array, rate).
          language: its code, "en" say. None: the likeliest by each recording's first window.
          task: "transcribe", or "translate" into English.
          batch_size: of windows.
          seed, strategy: as in `caption`.

        Raises:
          UserError: the model does not read speech, or knows no such language or task; a file is missing or is no
            recording, or an array has another shape or type; otherwise as `caption`.
        """
        return speech.transcribe(self, audios, language, task, batch_size, seed, strategy)

    def caption_likelihood_rows(
        self,
        images: Int[np.ndarray, " captions"],
        texts: Int[np.ndarray, " captions"],
        load_images: LoadRows,
        load_texts: LoadRows,
        batch_size: int = BATCH_SIZE,
    ) -> Float[np.ndarray, "captions length"]:
        """How likely, by the decoder, given captions are: the logarithm of each token's probability given the image and
        the tokens before it, the end token's too.

        It is 0 for what training does not count: padding (and with it an end token that also pads), and a start token
        that the decoder is given. Arguments: see `match_rows`; an image is encoded once for all of its captions.

        Raises:
          UserError: the model was not trained to caption.
        """
        self.needs("decoder", "caption images")
        shape = (self.config.model.encoders.text.length,)
        return self._of_pairs(self._caption_likelihood, shape, images, texts, load_images, load_texts, batch_size)

    def fill_mask(
        self, texts: str | Sequence[str], images: Sequence[Any] | None = None, top_k: int = 5
    ) -> list[language.Candidates] | list[list[language.Candidates]]:
        """What stands where texts have mask tokens: `fill_mask("Paris is the [MASK] of France.")`.

        Args:
          texts: one or more, each with at least one mask token as the tokenizer writes it.
          images: one for each text, for a model whose texts see images; as in `encode_image`.
          top_k: how many tokens, the likeliest first.

        Returns:
          For each mask token of a text pairs of a token and its probability; of several texts such a list for each.

        Raises:
          UserError: the model was not trained to fill in tokens, or a text hides none; otherwise as `encode_image`.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        if images is not None and len(images) != len(several):
            raise UserError(f"{len(images)} images and {len(several)} texts are no pairs")
        self.needs("masked", "fill in hidden tokens")
        load_images = None if images is None else self._loader(images)
        ids = self.without_padding(self.token_ids(several))
        found = language.fill_mask(self, several, ids, load_images, top_k)
        return found[0] if isinstance(texts, str) else found

    def _prompts(self, prompts: Sequence[str], max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Their ids without the end token, with room for what follows them, and how many they are."""
        tokenizer, text = self._known_tokenizer(), self.config.model.encoders.text
        if not self.config.model.decoder.start and tokenizer.start_id is None:
            raise UserError("config.model.decoder.start is off, and the tokenizer has no start token")
        ids = tokenizer.encode(list(prompts), text.length)
        ended = ids == tokenizer.end_id
        ended[:, 0] &= tokenizer.start_id != tokenizer.end_id
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1), (ids != tokenizer.pad_id).sum(axis=1))
        if max_new_tokens:
            room = min(positions_of(text), _power_of_two(lengths.max(initial=1)) + max_new_tokens)
            ids = np.pad(ids, ((0, 0), (0, max(0, room - ids.shape[1]))))[:, :room]
        return ids, lengths.astype(np.int32)

    def classify(self, images: Any, top_k: int = 5) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """The most probable classes of each image, or of one, with their probabilities (of all classes they add up to
        1).

        Args:
          images: as in `encode_image`.
          top_k: how many classes; all, if there are fewer.

        Raises:
          UserError: the model has no classifier; otherwise as `encode_image`.
        """
        if image_ops.is_one(images):
            return self.classify([images], top_k)[0]
        labels, found = self.config.model.classifier.get("labels", ()), []
        for logits in self.classify_rows(len(images), self._loader(images)):
            exponents = np.exp(logits - logits.max())
            best = np.argsort(-logits, kind="stable")[:top_k]
            found.append([(labels[index], float(exponents[index] / exponents.sum())) for index in best])
        return found

    def classify_rows(
        self, count: int, load_images: LoadRows, batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "rows classes"]:
        """The logits of `classify` for `count` images; the loader gives pixels, as in `encode_rows`."""
        self.needs("classifier", "classify images")
        run = partial(self._of_image, method="classify")
        parts = [np.zeros((0, len(self.config.model.classifier.labels)), np.float32)]
        return np.concatenate([*parts, *self.batches(run, count, {"inputs": load_images}, batch_size)])

    def predict_image_tokens(
        self, images: Any, masked: Bool[np.ndarray, "images patches"], batch_size: int = 32
    ) -> Float[np.ndarray, "images patches vocab"]:
        """The logits of the visual token (BEiT's, of a codebook) at each patch: float32.

        Args:
          images: as in `encode_image`; one is as several.
          masked: True for the patches, row by row, that are hidden from the model.
          batch_size: how many images at a time.

        Raises:
          UserError: the model was not trained to, `masked` has another shape; otherwise as `encode_image`.
        """
        self.needs("image_tokens", "predict the visual tokens of images")
        images = [images] if image_ops.is_one(images) else images
        encoder = self.config.model.encoders.image
        masked, shape = np.asarray(masked, bool), (len(images), patch_count(encoder))
        if masked.shape != shape:
            raise UserError(f"masked has the shape {[*masked.shape]}, and not {[*shape]}: one for each image and patch")
        loaders = {"inputs": self._loader(images), "masked": lambda rows: masked[rows]}
        run = partial(self._of_image, method="predict_image_tokens")
        parts = [np.zeros((0, shape[1], self.config.model.image_tokens.vocab_size), np.float32)]
        return np.concatenate([*parts, *self.batches(run, len(images), loaders, batch_size)])

    def needs(self, part: str, to: str) -> None:
        """Raises UserError where the model has not that part (of `mmjax.models.multimodal.PARTS`), which is there `to`
        do something.
        """
        if part not in self.module.parts:
            raise UserError(f"this model cannot {to}: none of its objectives trains that")

    def needs_encoder(self, modality: str) -> None:
        """Raises UserError where the model has no tower of a modality, or one of speech alone, which embeds nothing."""
        self.needs(modality, f"encode an input of the modality {modality}")
        if modality == "audio" and not {"image", "text"} & set(self.module.parts):
            raise UserError("this model embeds no recordings: it has no tower to compare them with")

    def encode_rows(self, modality: str, count: int, load_rows: LoadRows, batch_size: int = BATCH_SIZE) -> Embeddings:
        """Encodes `count` rows in batches of one shape; every process gets all of the result.

        Fewer rows than a batch take the next power of two, so that calls with any numbers of rows compile few programs.

        Args:
          modality: "image" or "text".
          count: how many rows there are.
          load_rows: row numbers -> the encoder's input; each process is asked for its own rows only.
          batch_size: the global batch; the last one is filled up, and what fills it is dropped.
        """
        width = self.config.model.embed_dim
        return self._encode_rows("embedding", width, modality, count, load_rows, batch_size)

    def features_rows(
        self, modality: str, count: int, load_rows: LoadRows, batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "rows width"]:
        """What the tower pools, before its projection and not normalised: float32, as wide as the tower.

        It is what a classifier on the frozen tower reads. A model without a contrastive loss has it too, but then
        nothing may have trained a pooling with parameters of its own (`map`). The arguments are those of `encode_rows`.
        """
        width = output_width(self.config.model.encoders[modality])
        return self._encode_rows("pooled", width, modality, count, load_rows, batch_size)

    def _encode_rows(
        self, output: str, width: int, modality: str, count: int, load_rows: LoadRows, batch_size: int
    ) -> Float[np.ndarray, "rows width"]:
        self.needs(modality, f"encode an input of the modality {modality}")

        def run(params: PyTree, batch: dict[str, jax.Array]) -> jax.Array:
            return self._encode(params, batch[modality], modality=modality, output=output)

        parts = [np.zeros((0, width), np.float32)]
        return np.concatenate([*parts, *self.batches(run, count, {modality: load_rows}, batch_size)])

    def batches(
        self, run: Callable[..., PyTree], count: int, loaders: dict[str, LoadRows], batch_size: int
    ) -> Iterator[PyTree[np.ndarray]]:
        """What `run(params, batch)` returns for all rows, batch by batch. While the devices compute one, the next is
        loaded.
        """
        waiting: list[tuple[slice, PyTree[jax.Array]]] = []

        def finished() -> PyTree[np.ndarray]:
            rows, result = waiting.pop(0)
            return jax.tree.map(lambda x: x[: rows.stop - rows.start], distributed.replicated_to_host(result))

        for rows, batch in self._placed(count, loaders, batch_size):
            with jax.set_mesh(self.mesh):
                waiting.append((rows, run(self.params, batch)))
            if len(waiting) > 1:
                yield finished()
                self._on_batch()
        if waiting:
            yield finished()
            self._on_batch()

    def _placed(
        self, count: int, loaders: dict[str, LoadRows], batch_size: int
    ) -> Iterator[tuple[slice, dict[str, jax.Array]]]:
        """All rows on the devices, batch by batch, with which they are; the last batch repeats the last row."""
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch_size = -(-min(batch_size, _power_of_two(count)) // devices) * devices
        sharding = batch_sharding(self.mesh)
        rows = distributed.local_rows(sharding, batch_size)
        for start in range(0, count, batch_size):
            local = {name: load(np.minimum(start + rows, count - 1)) for name, load in loaders.items()}
            with jax.set_mesh(self.mesh):
                batch = distributed.to_devices(local, rows, sharding, batch_size)
            yield slice(start, min(start + batch_size, count)), batch


def _power_of_two(least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << max(0, int(least) - 1).bit_length()
