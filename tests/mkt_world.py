"""Two families with tokenizers of their own, an LLM, and devices that tell what they find."""

import functools
import tempfile
from pathlib import Path

import torch
from fleet_of_four import SPEC, Device, Log, drive
from learning_world import FILLERS, SIGNS, TASK, examples, folder, model, tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from compression.codec import Compressor
from coordinator.algorithms.fedmkt import FedMktConfig, fedmkt
from coordinator.exchange import AdapterExchange, LocalTraining
from coordinator.families import Family
from coordinator.llm import Llm
from coordinator.twin import Twin
from edge_sdk.algorithms.logit_rows import pack
from edge_sdk.algorithms.vocabulary import Vocabulary
from edge_sdk.train.lora import Adapter, LoraSpec, delta, from_bytes
from edge_sdk.train.taught import aligned, chosen_texts, rows_of
from edge_sdk.train.teaching import Lesson, lesson_texts, logit_table, teach
from edge_sdk.train.text_task import TaskReader
from edge_sdk.wire.messages import AdapterUpdate, LogitRows, TeachAdapter, TopLogits

__all__ = ["SPEC", "Log", "drive", "examples"]

MAX_TOKENS = 60
FAMILIES = {"pieces": ("dev-c", "dev-d"), "words": ("dev-a", "dev-b")}
CFG = FedMktConfig(
    rounds=2,
    kept=8,
    llm=Lesson(steps=4, batch=8, lr=1e-2),
    slm=Lesson(steps=3, batch=8, lr=5e-3),
    training=LocalTraining(steps=3, lr=3e-2, batch=8),
)
PUBLIC = examples(24, seed=55)
UNSEEN = examples(20, seed=56)


@functools.cache
def pieces() -> Tokenizer:
    """A byte-level BPE of 300 tokens: some words are whole, others in two or three pieces."""
    corpus = [" ".join([*FILLERS, *TASK.labels]), "Request: Kind:\n"] * 8
    corpus += [f" {word}" for pair in SIGNS.values() for word in pair]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
        ),
    )
    return made


def pieces_model(*, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=96,
        vocab_size=pieces().get_vocab_size(),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def reader_of(family: str) -> TaskReader:
    return TaskReader(TASK, pieces() if family == "pieces" else tokenizer(), max_tokens=MAX_TOKENS)


def model_of(family: str) -> LlamaForCausalLM:
    return pieces_model() if family == "pieces" else model()


class Telling(Device):
    """A device that also answers TopLogits and TeachAdapter; `altered` changes the rows it sends.

    `lessons` are the tasks it got, `words` the LLM's vocabulary once it was sent.
    """

    family = ""
    altered = staticmethod(lambda rows: rows)
    words = None

    def learn(self, task):  # type: ignore[no-untyped-def]
        self.lessons = [*getattr(self, "lessons", ()), task]
        self.words = Vocabulary.from_bytes(task.words) if task.words else self.words
        if task.codec:
            self.codecs[task.codec_id] = Compressor.from_bytes(task.codec)
        codec, start = self.codecs[task.codec_id], from_bytes(task.adapter)
        pairs = list(zip(task.texts, task.labels, strict=True))
        rows = lesson_texts(self.reader, pairs, whole=task.whole)
        said = rows_of(task, self.words)
        self.adapter.load(start)
        with tempfile.TemporaryDirectory() as cache:
            targets = aligned(
                said, self.words, rows, self.reader, Path(cache), by_bytes=task.greedy
            )
        chosen = chosen_texts(self.adapter, said, rows, self.reader, pairs, whole=task.whole)
        how = Lesson(task.share, task.steps, task.batch, task.lr)
        teach(self.adapter, rows, targets, chosen, how, seed=task.seed)
        self.taught = self.adapter.factors()
        change = delta(self.taught, start)
        encoded = codec.encode(change, self.feedback, task.bytes_target)
        return AdapterUpdate(
            task.task_id, task.round, task.release, codec.codec_id, encoded.data,
            len(pairs), codec.raw_bytes, encoded.cosine, {}, 1.0,
        )  # fmt: skip

    def answer(self, message):  # type: ignore[no-untyped-def]
        if isinstance(message, TeachAdapter):
            return self.learn(message)
        if not isinstance(message, TopLogits):
            return super().answer(message)
        pairs = list(zip(message.texts, message.labels, strict=True))
        rows = lesson_texts(self.reader, pairs, whole=message.whole)
        V = len(Vocabulary.of(self.reader.tokenizer))
        table = logit_table(self.adapter.model, rows, kept=message.kept, vocabulary=V)
        truth, ids, logps = pack(table, V)
        return self.altered(
            LogitRows(
                message.task_id, message.round, message.release, table.places.digest, table.kept,
                truth, ids, logps, {}, 1.0,
            )
        )  # fmt: skip


def devices(*, n: int = 60, families=FAMILIES):  # type: ignore[no-untyped-def]
    made = {}
    for family, names in families.items():
        for name in names:
            seed = ord(name[-1])
            adapter = Adapter(model_of(family), SPEC)
            made[name] = Telling(name, adapter, reader_of(family), examples(n, seed=seed))
            made[name].family = family
    return made


class World:
    """Everything a run needs, made anew."""

    def __init__(self, home: Path, families=FAMILIES) -> None:  # type: ignore[no-untyped-def]
        spec = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
        self.llm = Llm(home, TASK, spec, seed=0, dtype=torch.float32)
        self.families = []
        for family, names in families.items():
            twin = Twin(family, model_of(family), reader_of(family), SPEC, seed=7)
            exchange = AdapterExchange(family, twin.layout, SPEC, seed=7)
            self.families.append(
                Family(twin, exchange, names, "base", lambda name, factors: Path(name))
            )
        self.log = Log()

    def program(self, cfg=CFG, **how):  # type: ignore[no-untyped-def]
        return fedmkt(
            self.llm, self.families, cfg, **{"public": PUBLIC, "seed": 3, **how}
        )  # fmt: skip


def home_of(path: Path) -> Path:
    """The LLM's folder: the same words as family "words", a larger model."""
    return folder(path, seed=4, width=48)
