"""A small WordPiece tokenizer, in the files of transformers' BertTokenizer."""

import base64
import json
from pathlib import Path

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "text_bert.json"


def write(folder):
    """Puts it into a folder: 435 tokens, of which [PAD], [UNK], [CLS], [SEP] and [MASK] are the first."""
    for name, content in json.loads(GOLDEN.read_text())["files"].items():
        (Path(folder) / name).write_bytes(base64.b64decode(content))
