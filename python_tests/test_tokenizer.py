"""The tokenizer: round trips, special tokens, streaming, foreign files, transformers."""

from __future__ import annotations

import json
import pickle
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from instructcore.errors import UserError
from instructcore.scheduler import SamplingParams, _Text
from instructcore.tokenizer import ASSISTANT, EOS, PAD, Tokenizer

TEXTS = [
    "写一篇关于人工智能的文章。人工智能正在改变我们的生活，也改变学校里的学习。",
    "Write a short article about the weather in spring. It's warm, and the birds don't sleep.",
    "def add(x, y):\n    return x + y\n",
    "What is 12 + 345? 12 + 345 = 357.",
] * 5
HARD = [
    "",
    " ",
    "a",
    "  two  spaces\t\ttabs\r\n\r\nlines \n ",
    "naïve café, Ångström, ΑΒΓ, жук, עברית, हिन्दी, 日本語とカナ, 한국어",
    "🙂👩‍👩‍👧 zero\x00byte \u200b\ufeff\ufffd",
    "2024年3月14日，北京的气温是21.5℃；（全角）！",
    "人" * 3000 + "1" * 3000 + "a" * 3000 + " " * 3000 + "." * 3000,
    f"{EOS}{PAD}{ASSISTANT} <|endoftext|></s>",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(TEXTS, 500)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else bpe


def foreign(style: str) -> tokenizers.Tokenizer:
    """Tokenizers as GPT-2, Llama 2 and Qwen publish them, trained on a little text."""
    specials = {"gpt2": ["<|endoftext|>"], "llama": ["<unk>", "<s>", "</s>"], "qwen": []}[style]
    if style == "llama":
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=specials + fallback, show_progress=False
        )
        backend.train_from_iterator(["the weather is warm and the birds sing"] * 9, trainer)
        spec = json.loads(backend.to_str())  # the byte tokens are ordinary ones in Llama's file
        spec["added_tokens"] = spec["added_tokens"][:3]
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=alphabet,
            special_tokens=specials,
            show_progress=False,
        ),
    )
    if style == "qwen":
        backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        backend.add_tokens(["<think>"])
    return backend


def test_known_values():
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.kind, tokenizer.vocab_size) == ("bytes", 259)
    assert tokenizer.encode("aé人") == [97, 195, 169, 228, 186, 186]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.assistant_id) == (256, 257, 258)
    assert tokenizer.prompt_ids("a") == [97, 258]
    assert tokenizer.decode([256, 97, 258, 228, 186, 257]) == "a\ufffd"
    assert [tokenizer.token_bytes(id) for id in (10, 255, 256)] == [b"\n", b"\xff", b""]


@pytest.mark.checklist(1)
@pytest.mark.parametrize("text", HARD)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    specials = {tokenizer.pad_id, tokenizer.eos_id, tokenizer.assistant_id}
    assert len(specials) == 3 and not specials & set(ids)


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_batch([]) == []


def test_every_byte_is_a_token(tokenizer):
    assert {bytes([b]) for b in range(256)} <= set(
        map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    )


def test_pieces(bpe):
    """Digits stand alone, Han runs are apart and capped, words keep their space."""
    tokens = [bpe.token_bytes(id) for id in range(bpe.vocab_size)]
    texts = [token.decode() for token in tokens if token.decode(errors="ignore").encode() == token]
    longer = [text for text in texts if len(text) > 1]
    assert not any(c.isdigit() for text in longer for c in text)
    han = [text for text in longer if any("\u4e00" <= c <= "\u9fff" for c in text)]
    assert "人工" in " ".join(han)
    assert all(len(text) <= 8 and all("\u4e00" <= c <= "\u9fff" for c in text) for text in han)
    assert " the" in texts and "改变" in texts
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 3


def test_training_is_deterministic(bpe, tmp_path):
    again = Tokenizer.train(iter(TEXTS), 500)
    bpe.save(tmp_path / "a")
    again.save(tmp_path / "b")
    files = [tmp_path / name / "tokenizer.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert bpe.vocab_size <= 500
    assert Tokenizer.train([], 1000).vocab_size == 259
    with pytest.raises(UserError, match="vocab_size must be >= 259 .* got 258"):
        Tokenizer.train(TEXTS, 258)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = [Tokenizer.load(path) for path in (tmp_path, tmp_path / "tokenizer.json")]
    for again in (*loaded, pickle.loads(pickle.dumps(tokenizer))):
        for name in ("kind", "vocab_size", "pad_id", "eos_id", "assistant_id"):
            assert getattr(again, name) == getattr(tokenizer, name)
        texts = [*HARD, f"{EOS} is text, as {ASSISTANT} is"]
        assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
        assert again.add_specials() == 0


def test_lone_surrogates_do_not_raise(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"
    assert tokenizer.encode_batch(["a\ud83db"]) == [tokenizer.encode("a?b")]


def test_stream_of_random_bytes():
    """Pieces join to the one-shot decoding, hold back <= 3 bytes, are whole characters."""
    tokenizer, random_ = Tokenizer.bytes(), random.Random(0)
    pool = [*"a人é🙂".encode(), 0x80, 0xC0, 0xE4, 0xED, 0xA0, 0xF0, 0xF4, 0x90, 0xFF, 256, 257]
    for _ in range(3000):
        ids = [random_.choice(pool) for _ in range(random_.randrange(12))]
        data = bytes(id for id in ids if id < 256)
        stream, text = tokenizer.stream(), ""
        for count, id in enumerate(ids, 1):
            piece = stream.feed(id)
            piece.encode("utf-8")
            text += piece
            seen = bytes(id for id in ids[:count] if id < 256)
            ends = (seen[: len(seen) - held] for held in range(4))
            assert any(text == end.decode(errors="replace") for end in ends)
        text += stream.flush()
        assert text == data.decode("utf-8", errors="replace") == tokenizer.decode(ids)


def test_stream_of_bpe(bpe):
    for text in HARD:
        stream = bpe.stream()
        pieces = [stream.feed(id) for id in bpe.encode(text)]
        assert "".join(pieces) == text and stream.flush() == ""


def test_a_first_space_after_a_text_is_part_of_it(tmp_path):
    """Llama 2 puts a space before a text, which is none of it; between two words it is."""
    foreign("llama").save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.add_specials()
    prompt, response = tokenizer.encode("the weather"), tokenizer.encode("is warm")
    assert tokenizer.token_bytes(response[0]).startswith(b" ")
    asked = [*prompt, tokenizer.assistant_id]  # whose answer is a text of its own
    for before, rest in ((prompt, " is warm"), ([], "is warm"), (asked, "is warm")):
        stream = tokenizer.stream(before)
        assert "".join(map(stream.feed, response)) == rest
        text = _Text(tokenizer, SamplingParams(), before)
        for id in response:
            text.feed(id)
        assert text.finish() == rest


def test_tokens_by_themselves(bpe):
    """As text, with what is none escaped; special tokens by their names."""
    bytes_ = Tokenizer.bytes()
    assert [bytes_.token_text(id) for id in b"a\n"] == ["a", "\n"]
    assert bytes_.token_text(0xE6) == "\\xe6"
    for tokenizer in (bytes_, bpe):
        specials = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.assistant_id)
        assert [tokenizer.token_text(id) for id in specials] == [PAD, EOS, ASSISTANT]
        assert tokenizer.token_text(10**6) == "<|1000000|>"


@pytest.mark.parametrize("style", ["gpt2", "llama", "qwen"])
def test_foreign_files(style, tmp_path):
    backend = foreign(style)
    eos = {"gpt2": "<|endoftext|>", "llama": "</s>", "qwen": "<|im_end|>"}[style]
    config = {"eos_token": eos if style == "gpt2" else {"content": eos, "special": True}}
    if style == "gpt2":
        config["pad_token"] = eos  # a common habit, under which EOS is never learned
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    size = tokenizer.vocab_size
    assert size == backend.get_vocab_size()
    assert tokenizer.eos_id == backend.token_to_id(eos)
    assert tokenizer.pad_id is None and tokenizer.assistant_id is None
    ids = tokenizer.encode("the weather is warm")
    assert tokenizer.prompt_ids("the weather is warm") == ids
    assert tokenizer.add_specials() == 2
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.encode("the weather is warm") == ids and len(ids) < 19
    assert {tokenizer.pad_id, tokenizer.assistant_id} == {size, size + 1}
    for text in HARD + TEXTS[:4]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.assistant_id} & set(ids)
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert (again.pad_id, again.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)
    assert again.assistant_id == tokenizer.assistant_id and again.add_specials() == 0


def test_transformers_reads_ours(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from instructcore.model import GPT, ModelConfig

    shape = ModelConfig(vocab_size=tokenizer.vocab_size, layers=1, heads=1, width=8, context=16)
    GPT(shape).save(tmp_path, tokenizer)
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = cls.from_pretrained(tmp_path)
        assert len(theirs) == tokenizer.vocab_size
        assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
        for text in HARD[:-1]:
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text
        ids = [*tokenizer.prompt_ids("Hi 人"), *tokenizer.encode("ok"), tokenizer.eos_id]
        assert theirs.decode(ids, skip_special_tokens=True) == "Hi 人ok"
        messages = [{"role": "user", "content": "Hi 人"}]
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert rendered == tokenizer.prompt_ids("Hi 人")
        messages.append({"role": "assistant", "content": "ok"})
        assert theirs.apply_chat_template(messages, return_dict=False) == ids


def test_rejects(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: no such tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)
