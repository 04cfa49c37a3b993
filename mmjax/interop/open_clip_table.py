"""The tensors of open_clip's models."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from mmjax.interop import timm_vit
from mmjax.interop.table import PATCHES, ROW, SAME, TRANSPOSED, Form, Row, Table, dense, fused, norm

_NUMBER = Form(lambda x: x.reshape(()), lambda x: x)  # [1] with `nonscalar_logit_scale`
_FUSED = ("in_proj_weight", "in_proj_bias")
# What of the text tower stands on its own where it is no module of its own.
_TEXT_TENSORS = r"(?:token_embedding|positional_embedding|transformer|ln_final|text_projection)(?:\..*)?"


def is_custom(config: ConfigDict) -> bool:
    """Whether the text tower has to be a module of its own (`custom_text`); any other model is written without."""
    model = config.model
    return model.encoders.image.pooling == "map" or model.encoders.text.class_token or bool(model.decoder)


def table(config: ConfigDict) -> Table:
    """Our parameters and the tensors of open_clip."""
    model, custom = config.model, is_custom(config)
    rows = [
        Row("logit_scale", "logit_scale", _NUMBER),
        *_image_rows(model.encoders.image),
        *_text_rows(model.encoders.text, "text." if custom else ""),
        *(_decoder_rows(config) if model.decoder else ()),
    ]
    fixed = {}
    if "sigmoid" in [entry.kind for entry in config.objectives.values()]:
        rows.append(Row("logit_bias", "logit_bias", _NUMBER))
    else:
        fixed["logit_bias"] = 0.0
    # Some files have the text tower's tensors under the names of the other kind.
    renamed = (f"^({_TEXT_TENSORS})$", r"text.\1") if custom else (rf"^text\.({_TEXT_TENSORS})$", r"\1")
    return Table(tuple(rows), fixed, (r"(text\.|text_decoder\.)?attn_mask",), renamed=(renamed,))


def _image_rows(image: ConfigDict) -> Iterator[Row]:
    from mmjax.models.multimodal import output_width, tower_size

    if image.pooling == "map":
        yield from timm_vit.rows("visual.trunk")
        if image.projection:
            yield from dense("image_projection", "visual.head.proj", image.projection_bias)
        return
    yield Row("image/class_token", "visual.class_embedding", ROW)
    yield Row("image/patches/patch_embed/kernel", "visual.conv1.weight", PATCHES)
    yield Row("image/positions/position", "visual.positional_embedding")
    if image.embed_norm:
        yield from norm("image/embed_norm", "visual.ln_pre")
    yield from _blocks("image/transformer/blocks", "visual.transformer.resblocks.{}", bool(image.layer_scale))
    if image.queries:
        yield from _queries("image/queries", "visual.attn_pool", output_width(image) == tower_size(image).width)
    if image.pooling == "query":
        yield from _queries("image/pool/queries", "visual.attn_pool_contrastive")
    at_the_queries = "image/queries/norm" if image.queries else ""
    last = "image/transformer/norm" if image.final_norm else at_the_queries or "image/pool/pool_norm"
    yield from norm(last, "visual.ln_post")
    yield Row("image_projection/kernel", "visual.proj")


def _text_rows(text: ConfigDict, prefix: str) -> Iterator[Row]:
    yield Row("text/embed/token_embed/embedding", f"{prefix}token_embedding.weight")
    yield Row("text/embed/position", f"{prefix}positional_embedding")
    if text.class_token:
        yield Row("text/class_token", f"{prefix}cls_emb", ROW)
    yield from _blocks("text/transformer/blocks", f"{prefix}transformer.resblocks.{{}}", bool(text.layer_scale))
    yield from norm("text/transformer/norm" if text.final_norm else "text/pool/pool_norm", f"{prefix}ln_final")
    if text.projection_bias:
        yield from dense("text_projection", f"{prefix}text_projection")
    elif text.projection:
        yield Row("text_projection/kernel", f"{prefix}text_projection")


def _decoder_rows(config: ConfigDict) -> Iterator[Row]:
    blocks, scaled = "decoder/transformer/blocks", bool(config.model.encoders.text.layer_scale)
    if config.model.decoder.image_queries:
        yield from _queries("decoder/image_queries", "visual.attn_pool")
    yield from _blocks(blocks, "text_decoder.resblocks.{}", scaled)
    names = {"attention": "cross_attention", "mlp": "cross_mlp", "norm1": "norm_cross", "norm2": "norm_cross_mlp"}
    yield from _blocks(blocks, "text_decoder.cross_attn.{}", scaled, names)
    yield from norm(f"{blocks}/norm_context", "text_decoder.cross_attn.{}.ln_1_kv")
    yield from norm("decoder/transformer/norm", "text_decoder.ln_final")
    yield Row("decoder/token_head/vocab", "text_decoder.text_projection", TRANSPOSED)


def _blocks(ours: str, theirs: str, layer_scale: bool, names: dict[str, str] | None = None) -> Iterator[Row]:
    """The rows of a tower's layers; `names` are those of our modules where they are not the usual ones."""
    norm1, attention, norm2, mlp = ((names or {}).get(name, name) for name in ("norm1", "attention", "norm2", "mlp"))
    yield from norm(f"{ours}/{norm1}", f"{theirs}.ln_1")
    yield from fused(f"{ours}/{attention}", f"{theirs}.attn.", _FUSED)
    yield from dense(f"{ours}/{attention}/out", f"{theirs}.attn.out_proj")
    yield from norm(f"{ours}/{norm2}", f"{theirs}.ln_2")
    yield from dense(f"{ours}/{mlp}/up", f"{theirs}.mlp.c_fc")
    yield from dense(f"{ours}/{mlp}/down", f"{theirs}.mlp.c_proj")
    if layer_scale:
        yield Row(f"{ours}/{attention}_layer_scale", f"{theirs}.ls_1.gamma")
        yield Row(f"{ours}/{mlp}_layer_scale", f"{theirs}.ls_2.gamma")


def _queries(ours: str, theirs: str, one_width: bool = True) -> Iterator[Row]:
    """The rows of an attentional pooler; its projections are one tensor where queries and tokens have one width."""
    yield Row(f"{ours}/probe", f"{theirs}.query")
    yield from norm(f"{ours}/query_norm", f"{theirs}.ln_q")
    yield from norm(f"{ours}/input_norm", f"{theirs}.ln_k")
    if one_width:
        yield from fused(f"{ours}/attention", f"{theirs}.attn.", _FUSED)
    else:
        for index, name in enumerate(("query", "key", "value")):
            yield Row(f"{ours}/attention/{name}/kernel", f"{theirs}.attn.{name[0]}_proj_weight", TRANSPOSED)
            yield Row(f"{ours}/attention/{name}/bias", f"{theirs}.attn.in_proj_bias", SAME, (index, 3))
    yield from dense(f"{ours}/attention/out", f"{theirs}.attn.out_proj")
