"""BERT ("BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin et al. 2019), as
transformers' `BertModel`, `BertForMaskedLM` and `BertForPreTraining` have it, and in folders of sentence-transformers
("Sentence-BERT", Reimers & Gurevych 2019).

What a text's embedding is: in a folder of sentence-transformers what that library makes of it, always of unit norm;
otherwise the pooler's output where the checkpoint has a pooler, and else the mean of the tokens. The head that tells
whether one sentence follows another (`cls.seq_relationship`) is left out.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmjax import config as configs
from mmjax.errors import UserError
from mmjax.interop.clip import tower, tower_settings
from mmjax.interop.family import TENSORS, Family, Json
from mmjax.interop.table import Row, Table, dense, norm

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
# What has the head of masked language modelling, and what the pooler.
_HEADS, _POOLERS = ("BertForMaskedLM", "BertForPreTraining"), ("BertModel", "BertForPreTraining")
# What a model here always is.
FIXED = {"position_embedding_type": "absolute", "is_decoder": False, "tie_word_embeddings": True}
_MODULES = "modules.json"
_POOLING = "1_Pooling/config.json"
_SENTENCES = "sentence_bert_config.json"
_MODES = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
_POOLER = "pooler.dense.weight"


def to_config(theirs: Json, files: Mapping[str, Json]) -> ConfigDict:
    """Our config of a BERT model."""
    theirs = _DEFAULTS | theirs
    kind = (theirs.get("architectures") or ["BertModel"])[0]
    if kind not in (*_HEADS, *_POOLERS):
        raise UserError(f"config.json: {kind} is none of {', '.join(sorted({*_HEADS, *_POOLERS}))}")
    check_fixed(theirs)
    has_sentences = bool(files.get(_MODULES))
    pooling = _sentence_pooling(files) if has_sentences else "cls" if kind in _POOLERS else "mean"
    config = configs.default()
    config.model.embed_dim = theirs["hidden_size"]
    config.model.logit_scale, config.model.logit_bias = 1.0, 0.0
    config.model.encoders.text = text_encoder(
        theirs,
        token_types=theirs["type_vocab_size"],
        length=min(theirs["max_position_embeddings"], _longest(files)),
        pooling=pooling,
        pool_dense=pooling == "cls" and not has_sentences,
        projection=False,
    )
    config.model.parts = ("text",)
    if kind in _HEADS and not has_sentences:
        config.model.fusion = configs.fusion(depth=0, reads="tower")
        config.model.parts = ("text", "fusion", "masked")
    if TENSORS in files:
        _follow_tensors(config, files[TENSORS])
    return config


def check_fixed(theirs: Mapping[str, Any]) -> None:
    """Raises UserError where a setting is another than a model here has."""
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise UserError(f"config.json: {name} is {theirs[name]!r}, and a model here has {value!r}")


def text_encoder(theirs: Mapping[str, Any], **fields: Any) -> ConfigDict:
    """The settings of a text tower that is BERT's."""
    return configs.text_encoder(
        **tower(theirs),
        vocab_size=theirs["vocab_size"],
        positions=theirs["max_position_embeddings"],
        norm="post",
        mask_padding=True,
        pad_id=theirs["pad_token_id"],
        **fields,
    )


def _longest(files: Mapping[str, Json]) -> int:
    """How many tokens a text has at most: sentence-transformers' setting, or the tokenizer's."""
    sentences = files.get(_SENTENCES, {}).get("max_seq_length")
    return int(sentences or files.get("tokenizer_config.json", {}).get("model_max_length") or 10**9)


def _sentence_pooling(files: Mapping[str, Json]) -> str:
    """What a folder of sentence-transformers pools: "mean" or "cls".

    Raises:
      UserError: it does something else with a text than a model here.
    """
    modules = [module["type"].rpartition(".")[2] for module in files[_MODULES]]
    if modules[:2] != ["Transformer", "Pooling"] or modules[2:] not in ([], ["Normalize"]):
        raise UserError(f"{_MODULES}: {', '.join(modules)} are not Transformer, Pooling and Normalize")
    if files.get("config_sentence_transformers.json", {}).get("default_prompt_name"):
        raise UserError("config_sentence_transformers.json: default_prompt_name puts a prompt before every text")
    lower = files.get(_SENTENCES, {}).get("do_lower_case")
    if lower and not files.get("tokenizer_config.json", {}).get("do_lower_case"):
        raise UserError(f"{_SENTENCES}: do_lower_case is on, and the tokenizer keeps capitals")
    pooling = files.get(_POOLING, {})
    named, older = pooling.get("pooling_mode", ()), "pooling_mode_"
    modes = {named} if isinstance(named, str) else {*named}
    modes |= {key.removeprefix(older) for key, value in pooling.items() if key.startswith(older) and value is True}
    modes = sorted(modes)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(f"{_POOLING}: texts are pooled by {' and '.join(modes) or 'nothing'}, neither cls nor mean")
    return _MODES[modes[0]]


def _follow_tensors(config: ConfigDict, names: Collection[str]) -> None:
    """Has a pooler where the tensors have one, and none where they have not."""
    text, has_pooler = config.model.encoders.text, any(name.endswith(_POOLER) for name in names)
    if text.pool_dense and not has_pooler:
        text.pooling, text.pool_dense = "mean", False
    if "masked" in config.model.parts and has_pooler:
        text.pooling, text.pool_dense = "cls", True


def to_theirs(config: ConfigDict) -> dict[str, Any]:
    """The config.json of a BERT model."""
    text = config.model.encoders.text
    kinds = ("BertForPreTraining", "BertForMaskedLM") if _has_head(config) else ("BertModel", "BertModel")
    return text_settings(text) | {
        "model_type": "bert",
        "architectures": [kinds[0] if text.pool_dense else kinds[1]],
        "type_vocab_size": text.token_types,
    }


def text_settings(text: ConfigDict) -> dict[str, Any]:
    """`text_encoder`, the other way."""
    from mmjax.models.multimodal import positions_of

    return tower_settings(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": positions_of(text),
        "pad_token_id": text.pad_id,
    }


def _has_head(config: ConfigDict) -> bool:
    return "masked" in config.model.parts


def files(config: ConfigDict) -> dict[str, Any]:
    """Those of sentence-transformers, where a text's embedding is no pooler's output."""
    text = config.model.encoders.text
    if text.pool_dense or _has_head(config):
        return {}
    names = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    modes = {f"pooling_mode_{mode}": _MODES[mode] == text.pooling for mode in ("cls_token", "mean_tokens")}
    return {
        _MODULES: modules,
        _POOLING: {"word_embedding_dimension": config.model.embed_dim} | modes,
        _SENTENCES: {"max_seq_length": text.length, "do_lower_case": False},
    }


def embeddings(ours: str, theirs: str) -> Iterator[Row]:
    """The rows of the embeddings, but for the types of tokens."""
    yield Row(f"{ours}/token_embed/embedding", f"{theirs}.word_embeddings.weight")
    yield Row(f"{ours}/position", f"{theirs}.position_embeddings.weight")
    yield from norm(f"{ours}/norm", f"{theirs}.LayerNorm")


def blocks(ours: str, theirs: str, cross: bool = False) -> Iterator[Row]:
    """The rows of a tower's layers."""
    attentions = [("attention", "attention", "norm1")]
    attentions += [("cross_attention", "crossattention", "norm_cross")] if cross else []
    for own, their, its_norm in attentions:
        for name in ("query", "key", "value"):
            yield from dense(f"{ours}/{own}/{name}", f"{theirs}.{their}.self.{name}")
        yield from dense(f"{ours}/{own}/out", f"{theirs}.{their}.output.dense")
        yield from norm(f"{ours}/{its_norm}", f"{theirs}.{their}.output.LayerNorm")
    yield from dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense")
    yield from dense(f"{ours}/mlp/down", f"{theirs}.output.dense")
    yield from norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm")


def head(ours: str, theirs: str) -> Iterator[Row]:
    """The rows of the head that predicts tokens."""
    yield from dense(f"{ours}/transform", f"{theirs}.transform.dense")
    yield from norm(f"{ours}/norm", f"{theirs}.transform.LayerNorm")
    yield Row(f"{ours}/vocab_bias", f"{theirs}.bias")


def tied_head(theirs: str, words: str) -> dict[str, str]:
    """The head's tensors that are others, too: see `Table.tied`."""
    return {f"{theirs}.decoder.weight": words, f"{theirs}.decoder.bias": f"{theirs}.bias"}


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of `transformers.BertModel` or `BertForMaskedLM`."""
    has_head, text = _has_head(config), config.model.encoders.text
    prefix, predictions = "bert." if has_head else "", "cls.predictions"
    rows = [
        *embeddings("text/embed", f"{prefix}embeddings"),
        *blocks("text/transformer/blocks", f"{prefix}encoder.layer.{{}}"),
    ]
    rows += [Row("text/embed/token_type", f"{prefix}embeddings.token_type_embeddings.weight")] * bool(text.token_types)
    rows += dense("text/pool/dense", f"{prefix}pooler.dense") if text.pool_dense else ()
    rows += head("fusion/token_head", predictions) if has_head else ()
    ignored = (r"(bert\.)?embeddings\.position_ids", r"cls\.seq_relationship\..*")
    if not has_head:
        ignored += (r"cls\..*",)
    if not text.pool_dense:
        ignored += (r"(bert\.)?pooler\..*",)
    # Google's own checkpoints say gamma and beta; heads are saved with the prefix, and the bare model without it.
    bare = (r"^(?=embeddings\.|encoder\.|pooler\.)", prefix) if has_head else (r"^bert\.", "")
    return Table(
        tuple(rows),
        {"logit_scale": 0.0, "logit_bias": 0.0},
        ignored,
        tied_head(predictions, f"{prefix}embeddings.word_embeddings.weight") if has_head else {},
        (bare, (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    )


FAMILY = Family("bert", to_config, to_theirs, table, files)
