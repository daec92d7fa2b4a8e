"""Text to token ids and back: plain bytes, or byte-level BPE on the `tokenizers` library.

Every text has ids and comes back byte for byte: all 256 bytes are tokens. Besides them there are
three special tokens, which user text never yields, whatever it spells: padding, end of text, and
the marker between a prompt and its response. `tokenizer.json` is Hugging Face's format, so theirs
are read too.

BPE merges stay within pieces of text: a word with the space before it, ONE digit, a run of
punctuation, white space, or up to 8 Han characters. Digits alone make numbers regular; Han runs
have no spaces, and without a cap whole sentences would become tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import UserError

_Bytes = bytes  # inside Tokenizer the name is that of its constructor
PAD, EOS, ASSISTANT = "<|pad|>", "<|eos|>", "<|assistant|>"

_PIECES = (
    r"\p{Han}{1,8}"
    r"|'(?:[sdmt]|ll|ve|re)\b"
    r"| ?[\p{L}\p{M}&&[^\p{Han}]]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
# What other families call their end of text, should their files not say.
_KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")
# Messages render to what training sees: prompt <|assistant|> response <|eos|>.
_CHAT_TEMPLATE = """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] + eos_token -}}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


class Tokenizer:
    """Ids 0 .. vocab_size - 1 and texts.

    Attributes:
        vocab_size: one more than the largest id.
        kind: "bytes" (id = byte) or "bpe".
        pad_id, eos_id, assistant_id: the special tokens. None: this tokenizer, from elsewhere,
            lacks it and `add_specials` adds it.
    """

    def __init__(self, backend, eos: str | None = None, pad: str | None = None):
        """Wraps a tokenizers.Tokenizer whose end-of-text and padding tokens go by these names."""
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that spells a special token is text
        vocab = backend.get_vocab(with_added_tokens=False)
        plain = {letter: byte for byte, letter in enumerate(_byte_letters())}
        self.kind = "bytes" if vocab == plain else "bpe"
        self._eos, self._pad = eos, pad
        self._refresh()
        # SentencePiece's habit: a space before the first word, which is not part of the text.
        first = [] if self.kind == "bytes" else self.encode("a")
        self._adds_space = bool(first) and self.token_bytes(first[0]).startswith(b" ")

    def __reduce__(self) -> tuple:  # the backend's pickle forgets what __init__ sets
        return Tokenizer, (self._backend, self._eos, self._pad)

    def _refresh(self) -> None:
        find = self._backend.token_to_id
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        self.eos_id = find(self._eos) if self._eos else None
        pad_id = find(self._pad) if self._pad else None
        self.pad_id = None if pad_id == self.eos_id else pad_id
        self.assistant_id = find(ASSISTANT)
        self._table: list[_Bytes] = []

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 bytes, each its own id, and the three special tokens."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([PAD, EOS, ASSISTANT])
        return cls(backend, EOS, PAD)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokens."""
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        if vocab_size < 259:
            raise UserError(
                "tokenizer: vocab_size must be >= 259 (256 bytes and 3 special tokens), "
                f"got {vocab_size}"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=_byte_letters(),
            special_tokens=[PAD, EOS, ASSISTANT],
            show_progress=False,
        )
        backend.train_from_iterator(map(_encodable, texts), trainer)
        return cls(backend, EOS, PAD)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a directory; a UserError if there is none."""
        from tokenizers import Tokenizer as Backend

        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            final = path / "final"
            hint = f"; this is a run, whose tokenizer is in {final}" if final.is_dir() else ""
            raise UserError(f"{file}: no such tokenizer{hint}")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file}: not a readable tokenizer: {error}") from error
        names = _special_names(file.parent)
        known = [EOS, names.get("eos_token"), *_KNOWN_EOS], [PAD, names.get("pad_token")]
        eos, pad = (
            next((name for name in some if name and backend.token_to_id(name) is not None), None)
            for some in known
        )
        return cls(backend, eos, pad)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the tokenizer_config.json that transformers wants."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), "utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos}
        config |= {"pad_token": self._pad, "clean_up_tokenization_spaces": False}
        if self.assistant_id is not None:
            config["additional_special_tokens"] = [ASSISTANT]
            config["chat_template"] = _CHAT_TEMPLATE.strip()
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")

    def add_specials(self) -> int:
        """Adds the missing ones of the three special tokens; returns how many. Old ids stay."""
        before = self.vocab_size
        self._eos = self._eos or EOS
        self._pad = self._pad if self.pad_id is not None else PAD
        self._backend.add_special_tokens([self._pad, self._eos, ASSISTANT])
        self._refresh()
        return self.vocab_size - before

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special token, even if it spells one. A lone surrogate becomes "?"."""
        if self.kind == "bytes":
            return list(text.encode("utf-8", "replace"))
        return self._backend.encode(_encodable(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.kind == "bytes":
            return [self.encode(text) for text in texts]
        texts = [_encodable(text) for text in texts]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt_ids(self, text: str) -> list[int]:
        """encode(text) and the assistant marker, if there is one: a response comes next."""
        return self.encode(text) + ([] if self.assistant_id is None else [self.assistant_id])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out; U+FFFD for bytes that are no UTF-8."""
        stream = self.stream()
        return "".join(map(stream.feed, ids)) + stream.flush()

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder of ids as they come. After those of a text, a first space is part of it."""
        return TextStream(self, not after or not self.token_bytes(after[-1]))

    def token_bytes(self, id: int) -> _Bytes:
        """The bytes that a token stands for; none for a special token or an id without one."""
        if not self._table:
            self._table = self._byte_table()
        return self._table[id] if 0 <= id < len(self._table) else b""

    def token_text(self, id: int) -> str:
        """A token by itself: a special one by its name, bytes that are no text escaped."""
        if spelt := self.token_bytes(id):
            return spelt.decode("utf-8", "backslashreplace")
        return self._backend.id_to_token(id) or f"<|{id}|>"

    def _byte_table(self) -> list[_Bytes]:
        byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
        sentencepiece = getattr(self._backend.model, "byte_fallback", False)
        added = self._backend.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, id in self._backend.get_vocab().items():
            if id in added:
                table[id] = b"" if added[id].special else token.encode()
            elif not sentencepiece:
                table[id] = bytes(byte_of[letter] for letter in token)
            elif len(token) == 6 and token.startswith("<0x"):
                table[id] = bytes([int(token[3:5], 16)])
            else:
                table[id] = token.replace("\u2581", " ").encode()
        return table


class TextStream:
    """Decodes ids as they come, whole characters at a time.

    What `feed` returns, with `flush` at the end, joins to `decode` of all ids. At most 3 bytes are
    held back: the beginning of a character that may yet be completed.
    """

    def __init__(self, tokenizer: Tokenizer, begins: bool = True):
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = begins and tokenizer._adds_space

    def feed(self, id: int) -> str:
        """The characters that this id completes, perhaps none."""
        text = self._decoder.decode(self._token_bytes(id))
        if text and self._drop_space:
            text, self._drop_space = text.removeprefix(" "), False
        return text

    def flush(self) -> str:
        """The end of the text: bytes still held back complete no character."""
        return self._decoder.decode(b"", final=True)


def _encodable(text: str) -> str:
    """Without lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _special_names(directory: Path) -> dict[str, str]:
    """eos_token, pad_token as a Hugging Face directory names them, strings or objects."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    found = {key: config.get(key) for key in ("eos_token", "pad_token")}
    return {k: v["content"] if isinstance(v, dict) else v for k, v in found.items() if v}
