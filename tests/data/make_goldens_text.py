"""Writes the ids that transformers and open_clip give to some sentences, with the small vocabularies they used.

    python -m tests.data.make_goldens_text

Needs transformers, torch and open_clip. Vocabularies are learned from the sentences below alone.
"""

import base64
import gzip
import importlib.util
import io
import json
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"
LENGTHS = (12, 77)
SENTENCES = (
    "A red fox jumps over the lazy dog, and the dog doesn't mind at all.",
    "It's 12:45 o'clock; they've got 3,944 drawings & I'll take 20% of them!",
    "Two SMALL boats_with (white) sails in the harbour of A Coruña -- naïve café façade",
    "Ein kleines Mädchen läuft über die große Straße und trägt einen grünen Hut.",
    "Une vieille dame achète du pain à l'épicerie; elle n'a pas oublié son sac.",
    "Un niño pequeño juega al fútbol en la montaña, ¿verdad? ¡Sí!",
    "Uma menina de vestido azul está sentada na praia com seu irmão.",
    "Il gatto è seduto sul tetto della città perché c'è il sole.",
    "Een jongen fietst langs de gracht; zijn ijsje smelt in de zon.",
    "Маленькая девочка кормит голубей на площади, а рядом спит рыжий кот.",
    "Ένας άντρας διαβάζει εφημερίδα στο καφενείο. ΟΔΥΣΣΕΥΣ",
    "İstanbul'da ışıklı bir gemi; çocuklar güneşin altında IŞIK arıyor.",
    "رجل يمشي في السوق القديم، وَمَعَهُ قِطَّةٌ صغيرة",
    "مردی با کلاه سبز کنار رودخانه می‌نشیند",
    "एक छोटी लड़की बारिश में नाच रही है और हँस रही है।",
    "ผู้หญิงกำลังขายผลไม้ที่ตลาดน้ำในตอนเช้า",
    "一只橙色的猫坐在窗边看着外面的雨。",
    "東京の夜、赤い傘をさした女性が歩いている。カタカナも",
    "한 소년이 공원에서 강아지와 함께 뛰어놀고 있다.",
    "Một cậu bé đang thả diều trên cánh đồng lúa",
    "Seorang nelayan menarik jala di pantai saat matahari terbit.",
    "👩🏽‍🚀 astronaut 🇯🇵🇩🇪 🏳️‍🌈 and ❤️‍🔥 1️⃣ ☃",
    "e\u0301te\u0301 a\u0308pfel Z\u0351\u036b\u0343a\u0300\u0301lgo n\u0303 \u1112\u1161\u11ab",
    "def f(x): return {\"a\": x**2, 'b': [1, 2]}  # <html> \\n \t tab",
    "  leading,   double   and trailing spaces  \n new line\r\nand   no-break\u00a0space ",
    "ＦＵＬＬ width １２３ ﬁne ﬂight ™ ½ Ⅳ ㎏ “curly” ‘quotes’ it’s",
    "supercalifragilisticexpialidocious" * 6,
    " ".join(f"word{index} and a dog" for index in range(60)),
    "",
    " ",
    "!",
)


def byte_characters() -> list[str]:
    """GPT-2's characters for bytes, in CLIP's order."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, own), *(chr(256 + index) for index in range(256 - len(own)))]


def learn_clip_merges(count: int) -> list[tuple[str, str]]:
    """Learns merges of characters, the last of a word with </w>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=512 + count, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]][:count]


def clip_files(merges: list[tuple[str, str]]) -> dict[str, bytes]:
    """A Hugging Face folder of CLIP with these merges."""
    characters = byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    lines = ["#version: 0.2", *map(" ".join, merges)]
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "model_max_length": 77}
    return {
        "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False).encode(),
        "merges.txt": "\n".join([*lines, ""]).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def open_clip_files(merges: list[tuple[str, str]]) -> dict[str, bytes]:
    """The file of open_clip with these merges; without a last line break, which open_clip takes for one more."""
    content = "\n".join(['"bpe_simple_vocab', *map(" ".join, merges)])
    return {"bpe_simple_vocab_16e6.txt.gz": gzip.compress(content.encode(), mtime=0)}


def gpt2_files(size: int, config: dict) -> dict[str, bytes]:
    """A Hugging Face folder of GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]).encode(),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"} | config).encode(),
    }


def bert_files(size: int) -> dict[str, bytes]:
    """A Hugging Face folder of BERT: WordPiece, [CLS] and [SEP]."""
    from tokenizers import BertWordPieceTokenizer, processors

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(SENTENCES, vocab_size=size, min_frequency=1, show_progress=False)
    inner = tokenizer._tokenizer
    ends = [(token, inner.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ends
    )
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    return {"tokenizer.json": inner.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def sentencepiece_files(size: int, rule: str, config: dict, kind: str = "unigram") -> dict[str, bytes]:
    """A Hugging Face folder with a sentencepiece model: T5's layout, or with kind="bpe" Gemma's.

    With rule="spaces", the model has the part of T5's rules that makes spaces of white space: all of them take 240 kB.
    """
    import sentencepiece

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    gemma = {}
    if kind == "bpe":
        ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
        gemma = {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False} | names
    rules = {"normalization_rule_name": rule}
    if rule == "spaces":
        lines = [f"{ord(space):X}\t20" for space in "\t\n\r\u00a0\u2581"]
        file = Path(tempfile.gettempdir()) / "mmjax_spaces.tsv"
        file.write_text("\n".join([*lines, ""]))
        rules = {"normalization_rule_tsv": str(file)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence for sentence in SENTENCES if sentence.strip()] * 3),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
        **rules,
        **ids,
        **gemma,
    )
    name = "tokenizer.model" if kind == "bpe" else "spiece.model"
    return {name: model.getvalue(), "tokenizer_config.json": json.dumps(config).encode()}


def write(files: dict[str, bytes], folder: Path) -> Path:
    """Writes the files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def open_clip_tokenizer():
    """The module `open_clip.tokenizer` by itself: importing the package takes torchvision, which is not needed."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_ids(folder: Path, length: int) -> list[list[int]]:
    """The ids of `SENTENCES` by the class of transformers, or of open_clip, that a folder is for."""
    packed = folder / "bpe_simple_vocab_16e6.txt.gz"
    if packed.exists():
        return open_clip_tokenizer().SimpleTokenizer(str(packed))(list(SENTENCES), context_length=length).tolist()
    import transformers

    name = json.loads((folder / "tokenizer_config.json").read_bytes())["tokenizer_class"]
    tokenizer = getattr(transformers, name).from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"padding": "max_length", "truncation": True, "max_length": length, "padding_side": "right"}
    return tokenizer(list(SENTENCES), **options)["input_ids"]


def small_vocabularies() -> dict[str, dict[str, bytes]]:
    """Name -> files."""
    merges = learn_clip_merges(150)
    return {
        "clip": clip_files(merges),
        "open_clip": open_clip_files(merges),
        "gpt2": gpt2_files(400, {}),
        "gpt2_padded": gpt2_files(300, {"pad_token": "<|pad|>", "add_eos_token": True}),
        "bert": bert_files(250),
        "t5": sentencepiece_files(300, "spaces", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}),
        "siglip": sentencepiece_files(300, "spaces", {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}),
    }


def main() -> None:
    """Writes one JSON file for each vocabulary."""
    for name, files in small_vocabularies().items():
        with tempfile.TemporaryDirectory() as folder:
            write(files, Path(folder))
            ids = {length: peer_ids(Path(folder), length) for length in LENGTHS[:1]}
        packed = {file: base64.b64encode(content).decode() for file, content in files.items()}
        golden = {"files": packed, "ids": ids}
        (FOLDER / f"text_{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
