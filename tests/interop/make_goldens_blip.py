"""Writes goldens/blip.npz: what transformers makes of the inputs of test_blip.py.

python -m tests.interop.make_goldens_blip
"""

import tempfile

import numpy as np
import torch

from mmjax.interop import blip
from tests.interop import bert_tokenizer, folders, peers
from tests.interop.make_goldens_bert import filled
from tests.interop.test_blip import CAPTIONS, PROMPT, RETRIEVAL, TEXTS, pixels


def main():
    transformers = peers.transformers()
    with tempfile.TemporaryDirectory() as folder:
        bert_tokenizer.write(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokens(texts):
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    seen = peers.normalized(pixels(), blip.to_config(CAPTIONS, {}).model.encoders.image)
    model = filled(transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**RETRIEVAL)))
    with torch.inference_mode():
        matches = model(**tokens([*TEXTS]), pixel_values=seen).itm_score.softmax(dim=1)[:, 1]
        cosines = model(**tokens([*TEXTS]), pixel_values=seen, use_itm_head=False).itm_score
    model = filled(transformers.BlipForConditionalGeneration(transformers.BlipConfig(**CAPTIONS)))
    with torch.inference_mode():
        never = {"suppress_tokens": [tokenizer.pad_token_id]}  # as here
        written = model.generate(pixel_values=seen, **never)
        continued = model.generate(pixel_values=seen, **tokens([PROMPT] * 3), max_new_tokens=5, **never)
    results = {"matches": matches, "cosines": cosines, "written": written, "continued": continued}
    np.savez_compressed(folders.GOLDENS / "blip.npz", **{name: value.numpy() for name, value in results.items()})


if __name__ == "__main__":
    main()
