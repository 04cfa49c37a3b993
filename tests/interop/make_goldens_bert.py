"""Writes goldens/bert.npz: what transformers makes of the inputs of test_bert.py.

python -m tests.interop.make_goldens_bert
"""

import tempfile

import numpy as np
import torch

from tests.interop import bert_tokenizer, folders, peers
from tests.interop.test_bert import MASKED, SETTINGS, TEXTS, ids


def filled(model):
    """The same model with the tensors of `folders`; a tensor that is another one too is filled as that."""
    tied = model.all_tied_weights_keys
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    tensors = {name: torch.tensor(folders.filled(tied.get(name, name), shape)) for name, shape in shapes.items()}
    model.load_state_dict(tensors)
    return model.eval()


def main():
    transformers = peers.transformers()
    model = filled(transformers.BertModel(transformers.BertConfig(**SETTINGS)))
    mask = torch.tensor(ids() != 0)
    with torch.inference_mode():
        out = model(input_ids=torch.tensor(ids()), attention_mask=mask)
        masked = mask[..., None].float()
        mean = (out.last_hidden_state * masked).sum(dim=1) / masked.sum(dim=1)
    results = {"pooled": out.pooler_output, "mean": mean, "first": out.last_hidden_state[:, 0]}

    model = filled(transformers.BertForMaskedLM(transformers.BertConfig(**MASKED)))
    with tempfile.TemporaryDirectory() as folder:
        bert_tokenizer.write(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    likeliest = logits.softmax(dim=1).topk(3)
    results |= {"probabilities": likeliest.values, "likeliest": likeliest.indices}
    np.savez_compressed(folders.GOLDENS / "bert.npz", **{name: value.numpy() for name, value in results.items()})


if __name__ == "__main__":
    main()
