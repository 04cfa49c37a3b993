"""Texts from images, token by token: greedy, sampled, or by beam search."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mmjax.config import suggest
from mmjax.errors import UserError
from mmjax.models.multimodal import MultimodalModel

Texts = tuple[Int[Array, "batch length"], Float[Array, " batch"]]


class Strategy(NamedTuple):
    """How the next token is chosen.

    With `beams` of 1 it is drawn from the model's distribution: `temperature` 0 takes the likeliest (greedy), `top_k`
    keeps so many of the likeliest (0: all), `top_p` the likeliest that together have this probability ("The Curious
    Case of Neural Text Degeneration", Holtzman et al. 2020, section 3.1). More beams search for the likeliest text;
    sums of log-probabilities are divided by ((5 + tokens) / 6)^length_penalty ("Google's Neural Machine Translation
    System", Wu et al. 2016, eq. 14). A text ends after `max_new_tokens` that follow its prompt, where that is not 0.

    `suppress` are ids that are never chosen, `suppress_first` those that a text does not begin with, after its prompt;
    like padding they have no share of the probability.
    """

    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 0
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()


GREEDY = Strategy()


def make_strategy(options: Mapping[str, Any], vocab_size: int) -> Strategy:
    """The strategy with these fields.

    Raises:
      UserError: one is unknown, has a value that cannot be, or has no effect.
    """
    unknown = set(options) - set(Strategy._fields)
    if unknown:
        raise UserError(f"unknown option {min(unknown)}; {suggest(min(unknown), Strategy._fields)}")
    chosen = Strategy(**options)
    if chosen.max_new_tokens < 0:
        raise UserError(f"max_new_tokens: {chosen.max_new_tokens} is less than 0")
    if chosen.beams < 1 or chosen.temperature < 0 or chosen.top_k < 0 or not 0 < chosen.top_p <= 1:
        raise UserError(f"{chosen}: beams is at least 1, temperature and top_k are not negative, top_p is in (0, 1]")
    if chosen.beams > 1 and chosen.temperature:
        raise UserError("a search with beams draws nothing: leave out beams or temperature")
    if not chosen.temperature and (chosen.top_k or chosen.top_p < 1):
        raise UserError("top_k and top_p say what is drawn, and temperature 0 draws nothing: set it to 1, say")
    ids = {name: tuple(map(int, getattr(chosen, name))) for name in ("suppress", "suppress_first")}
    for name, given in ids.items():
        if given and not 0 <= min(given) <= max(given) < vocab_size:
            raise UserError(f"{name}: ids of tokens are from 0 to {vocab_size - 1}")
    return chosen._replace(**ids)


class _Search(NamedTuple):
    """Texts under way; `place` is that of the token that `logits` predict, `score` the sum of log-probabilities."""

    place: Int[Array, ""]
    ids: Int[Array, "rows length"]
    logits: Float[Array, "rows vocab"]
    cache: PyTree[Array]
    finished: Bool[Array, " rows"]
    score: Float[Array, " rows"]
    count: Int[Array, " rows"]


def generate(
    module: MultimodalModel,
    params: PyTree,
    image: Float[Array, "batch tokens embed"],
    prompt: Int[Array, "batch length"],
    prompt_length: Int[Array, " batch"],
    rng: Key[Array, " batch"],
    end_id: int | None,
    strategy: Strategy = GREEDY,
) -> Texts:
    """Texts that go on from a prompt; to be jit-compiled. One program serves prompts of any lengths.

    Args:
      module, params: a model with a decoder.
      image: the image tower's tokens.
      prompt: ids that the texts begin with, filled up with anything to the length that texts have at most.
      prompt_length: how many of them; where the decoder has no `start` vector at least 1, the start token.
      rng: a key for each text, for sampling: what is drawn for it does not depend on the others.
      end_id: the token after which a text is finished; None where there is none, and texts are as long as can be.
      strategy: static.

    Returns:
      The ids, int32, prompt and end token included, padding after it; and each text's score: the sum of the
      log-probabilities of its tokens after the prompt, with beams divided by the length penalty. Padding is never
      chosen, and has no share of the probability.
    """
    step = _Step(module, params, prompt, prompt_length, end_id, strategy)
    search = step.begin(image)
    if strategy.beams == 1:
        found = _run(search, step, lambda search: _drawn(search, rng, strategy), prompt.shape[1])
        return found.ids, found.score
    beams = _beam_search(search, step, strategy)
    # The likeliest text may begin with tokens that all beams have left behind: greedy search is one more candidate.
    greedy = _run(search, step, lambda search: _drawn(search, rng, GREEDY), prompt.shape[1])
    greedy_score = greedy.score / penalty(greedy.count, strategy.length_penalty)
    better = greedy_score > beams[1]
    return jnp.where(better[:, None], greedy.ids, beams[0]), jnp.where(better, greedy_score, beams[1])


def penalty(count: Int[Array, " rows"], power: float) -> Float[Array, " rows"]:
    """What the score of a text of so many tokens is divided by."""
    return ((5 + jnp.maximum(count, 1)) / 6) ** power


class _Step(NamedTuple):
    """Puts a token at the end of each text, and asks the model for the next."""

    module: MultimodalModel
    params: PyTree
    prompt: Int[Array, "rows length"]
    prompt_length: Int[Array, " rows"]
    end_id: int | None
    strategy: Strategy

    def begin(self, image: Float[Array, "rows tokens embed"]) -> _Search:
        """Texts of nothing, or of their start token alone."""
        first, length = self.prompt[:, 0], self.prompt.shape[1]
        logits, cache = self.module.apply({"params": self.params}, image, first, length, method="begin_caption")
        ids = jnp.full(self.prompt.shape, self.pad_id, jnp.int32)
        first = 0 if self.module.config["decoder"]["start"] else 1
        ids = ids.at[:, :first].set(self.prompt[:, :first])
        none = jnp.zeros(len(ids), jnp.int32)
        possible = self._possible(logits, jnp.int32(first))
        return _Search(jnp.int32(first), ids, possible, cache, none > 0, none.astype(jnp.float32), none)

    def forced(self, place: Int[Array, ""]) -> Bool[Array, " rows"]:
        """Which texts are still in their prompt."""
        return place < self.prompt_length

    def __call__(self, search: _Search, token: Int[Array, " rows"]) -> _Search:
        log_probabilities = jax.nn.log_softmax(search.logits)
        own = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
        free = ~search.finished & ~self.forced(search.place)
        finished = search.finished if self.end_id is None else search.finished | (free & (token == self.end_id))
        if self.strategy.max_new_tokens:
            finished = finished | (search.place + 1 >= self.prompt_length + self.strategy.max_new_tokens)
        token = jnp.where(search.finished, self.pad_id, token)
        slot = search.place + (1 if self.module.config["decoder"]["start"] else 0)
        arguments = token, slot, search.cache, self.prompt.shape[1]
        logits, cache = self.module.apply({"params": self.params}, *arguments, method="continue_caption")
        return _Search(
            search.place + 1,
            search.ids.at[:, search.place].set(token),
            self._possible(logits, search.place + 1),
            cache,
            finished,
            search.score + jnp.where(free, own, 0.0),
            search.count + free,
        )

    def repeated(self, beams: int) -> "_Step":
        """For so many beams of each text."""
        return self._replace(
            prompt=jnp.repeat(self.prompt, beams, axis=0), prompt_length=jnp.repeat(self.prompt_length, beams)
        )

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        return self.module.config["encoders"]["text"]["pad_id"]

    def _possible(self, logits: Float[Array, "rows vocab"], place: Int[Array, ""]) -> Float[Array, "rows vocab"]:
        """Without padding, which training never asks for, unless it is the end token too; and without what the strategy
        suppresses at this place.
        """
        never = (*self.strategy.suppress, *(() if self.pad_id == self.end_id else (self.pad_id,)))
        logits = logits.at[:, never].set(-jnp.inf) if never else logits
        if not self.strategy.suppress_first:
            return logits
        first = (place == self.prompt_length)[:, None]
        return jnp.where(first, logits.at[:, self.strategy.suppress_first].set(-jnp.inf), logits)


def _run(search: _Search, step: _Step, choose: Callable[[_Search], Array], length: int) -> _Search:
    def body(search: _Search) -> _Search:
        forced = step.forced(search.place)
        return step(search, jnp.where(forced, step.prompt[:, search.place], choose(search)))

    return jax.lax.while_loop(lambda search: (search.place < length) & ~search.finished.all(), body, search)


def _drawn(search: _Search, keys: Key[Array, " rows"], strategy: Strategy) -> Int[Array, " rows"]:
    if strategy.temperature == 0:
        return search.logits.argmax(axis=1).astype(jnp.int32)
    logits = kept_logits(search.logits / strategy.temperature, strategy.top_k, strategy.top_p)
    own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, search.place)
    return jax.vmap(jax.random.categorical)(own_keys, logits).astype(jnp.int32)


def kept_logits(logits: Float[Array, "rows vocab"], top_k: int, top_p: float) -> Float[Array, "rows vocab"]:
    """Logits of what may be drawn; -inf elsewhere. The likeliest always may."""
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=1) - jax.nn.softmax(ordered)
        least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _beam_search(search: _Search, step: _Step, strategy: Strategy) -> Texts:
    (batch, length), beams = step.prompt.shape, strategy.beams
    step = step.repeated(beams)
    rows = jnp.repeat(jnp.arange(batch), beams)
    search = _take(search, rows)
    # All beams begin alike: only the first may go on.
    first = jnp.arange(batch * beams) % beams == 0
    search = search._replace(score=jnp.where(first, 0.0, -jnp.inf))

    def body(search: _Search) -> _Search:
        vocab = search.logits.shape[1]
        places = jnp.arange(vocab)
        forced, wanted = step.forced(search.place), step.prompt[:, search.place]
        gain = jax.nn.log_softmax(search.logits)
        gain = jnp.where(forced[:, None], jnp.where(places == wanted[:, None], 0.0, -jnp.inf), gain)
        gain = jnp.where(search.finished[:, None], jnp.where(places == step.pad_id, 0.0, -jnp.inf), gain)
        count = search.count + (~search.finished & ~forced)
        score = search.score[:, None] + gain
        ranked = score / penalty(count, strategy.length_penalty)[:, None]
        _, chosen = jax.lax.top_k(ranked.reshape(batch, beams * vocab), beams)
        parents = (jnp.arange(batch)[:, None] * beams + chosen // vocab).reshape(-1)
        token = (chosen % vocab).reshape(-1).astype(jnp.int32)
        # Where there are fewer ways to go on than beams, what is left over keeps its -inf.
        return step(_take(search, parents), token)._replace(score=score[parents, token])

    search = jax.lax.while_loop(lambda search: (search.place < length) & ~search.finished.all(), body, search)
    scores = (search.score / penalty(search.count, strategy.length_penalty)).reshape(batch, beams)
    best = jnp.arange(batch) * beams + scores.argmax(axis=1)
    return search.ids[best], scores.max(axis=1)


def _take(search: _Search, rows: Int[Array, " rows"]) -> _Search:
    """The same for other rows; caches have a layer axis before that of the rows."""
    taken: dict[str, Any] = {
        name: value[rows] for name, value in search._asdict().items() if name not in ("place", "cache")
    }
    return _Search(place=search.place, cache=jax.tree.map(lambda x: x[:, rows], search.cache), **taken)
