"""Special tokens: the same in training, sampling, export and serving."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from serving.endpoint.prompts import Prompts
from tests.training.data.small_corpus import change, silent, texts
from training.data.config import DataConfig
from training.data.dataset import DataError, Manifest
from training.data.prepare import prepare
from training.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from training.model.hf import save_hf
from training.model.shapes import LlamaShape

BEGIN, END = "<s>", "</s>"


def with_specials(path: Path, post_processor: dict | None) -> Path:
    """A tokenizer.json of the corpus with BEGIN, END and this post-processor."""
    tokenizer = train_tokenizer(texts(100), vocab_size=320)
    tokenizer.add_special_tokens([BEGIN, END])
    content = json.loads(tokenizer.to_str().replace("<|endoftext|>", "<unused>"))
    path.write_text(json.dumps(content | {"post_processor": post_processor}))
    return path


def template(*pieces: str) -> dict:
    """A TemplateProcessing of special tokens and "A", the text; ids as `with_specials` gives them."""
    ids = {BEGIN: 320, END: 321}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("post_processor", "begins"),
    [
        (template(BEGIN, "A", END), True),
        (template(BEGIN, "A"), True),
        (template("A", END), False),
        ({"type": "Sequence", "processors": [BYTES, template(BEGIN, "A", END)]}, True),
        (BYTES, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_special_tokens_are_the_same_in_training_sampling_export_and_serving(
    config: DataConfig, tmp_path: Path, post_processor: dict | None, begins: bool, wanted: bool
) -> None:
    given = with_specials(tmp_path / "given.json", post_processor)
    folder = prepare(change(config, tokenizer=str(given), add_special_tokens=wanted), report=silent)
    manifest = Manifest.read(folder)
    tokenizer = load_tokenizer(folder / manifest.tokenizer_file)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    assert (begin, end) == (320, 321) and manifest.end_of_text_id == end
    opening = [begin] if begins and wanted else []
    prompt = "the harbour"
    plain = tokenizer.encode(prompt, add_special_tokens=False).ids
    # Sampling encodes with the prepared tokenizer, and every document in the shards has this form.
    assert tokenizer.encode(prompt).ids == opening + plain
    tokens = np.fromfile(folder / "train-00000.bin", dtype=manifest.dtype)
    documents = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]
    assert len(documents) == manifest.train.documents
    for document in documents:
        assert document[: len(opening)].tolist() == opening and (document == begin).sum() == len(opening)
    # The export, as serving and as transformers encode a prompt with it.
    shape = LlamaShape(
        vocab_size=322, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, ffn_size=8
    )
    weights = {name: torch.zeros(size) for name, size in shape.parameters().items()}
    save_hf(
        tmp_path / "export", shape=shape, tensors=weights, dtype=torch.float32,
        tokenizer_file=folder / manifest.tokenizer_file, eos_id=end, bos_id=begin if opening else None,
    )  # fmt: skip
    served = Prompts(Tokenizer.from_file(str(tmp_path / "export/tokenizer.json")), context_tokens=100)
    assert served.at_once(prompt) == opening + plain
    assert AutoTokenizer.from_pretrained(tmp_path / "export")(prompt)["input_ids"] == opening + plain


def test_a_post_processor_of_encoders_is_refused_unless_it_is_not_wanted(
    config: DataConfig, tmp_path: Path
) -> None:
    roberta = {
        "type": "RobertaProcessing",
        "sep": [END, 321],
        "cls": [BEGIN, 320],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    given = with_specials(tmp_path / "given.json", roberta)
    with pytest.raises(
        DataError, match=r"RobertaProcessing is for encoder models; set data\.add_special_tokens=false"
    ):
        prepare(change(config, tokenizer=str(given)), report=silent)
    prepare(change(config, tokenizer=str(given), add_special_tokens=False), report=silent)


# Special tokens, ordinary added tokens, and the one that ends a document, of each family's base model.
FAMILIES = {
    "gpt-2": (["<|endoftext|>"], [], "<|endoftext|>"),
    "llama 2, mistral 7b": (["<unk>", "<s>", "</s>"], [], "</s>"),
    "mistral nemo": (["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[TOOL_CALLS]"], [], "</s>"),
    "gemma": (["<pad>", "<eos>", "<bos>", "<unk>"], ["<start_of_turn>", "<table>", "<s>", "</s>"], "<eos>"),
    "qwen 2.5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>"], "<|endoftext|>"),
    "deepseek v3": (
        ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
        ["<\uff5cUser\uff5c>", "<|EOT|>"],
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "llama 3": (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"],
        [],
        "<|end_of_text|>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_text_is_found_in_the_tokens_of_common_families(family: str) -> None:
    special, ordinary, end = FAMILIES[family]
    trained = train_tokenizer(texts(10), vocab_size=300).to_str().replace("<|endoftext|>", "<unused>")
    for order in (1, -1):
        tokenizer = Tokenizer.from_str(trained)
        tokenizer.add_tokens(ordinary)
        tokenizer.add_special_tokens(special[::order])
        assert tokenizer.id_to_token(end_of_text_id(tokenizer)) == end
        assert tokenizer.id_to_token(end_of_text_id(tokenizer, special[0])) == special[0]


def test_an_end_of_text_that_is_no_special_token_is_found_too() -> None:
    tokenizer = train_tokenizer(texts(10), vocab_size=300)
    tokenizer = Tokenizer.from_str(tokenizer.to_str().replace("<|endoftext|>", "<unused>"))
    tokenizer.add_tokens(["</s>"])
    assert tokenizer.id_to_token(end_of_text_id(tokenizer)) == "</s>"
