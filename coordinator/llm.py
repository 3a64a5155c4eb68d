"""The large model: writes labelled texts, and learns from how small models judge them.

Knows a Hugging Face causal model, its LoRA factors and the three losses of CrossLM. Does not know
who judged the texts, what is published, or any device.

The weights stay frozen; only the adapter learns. Switching it off gives theta_0, the frozen start.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge_sdk.errors import LocalProtocolError
from edge_sdk.train.lora import Adapter, Factors, LoraSpec, start_factors
from edge_sdk.train.text_task import (
    Sequences,
    TaskReader,
    Tokens,
    accuracy,
    label_probs,
    logits_at,
    padded,
    token_log_probs,
    word_log_probs,
)
from edge_sdk.train.trainer import optimize, shuffled_batches
from edge_sdk.wire.messages import TextTask

F32 = npt.NDArray[np.float32]

MAX_P = 1.0 - 1e-6
"""log(1 - p) is taken at most here: at p = 1 in 32 bits the loss would be infinite."""

MOST_WRITTEN = 48
"""Tokens of a public text that teach writing; a request is seldom longer."""


@dataclass(frozen=True, slots=True)
class Written:
    """Generated texts with the labels they were asked for, and their tokens with prompt."""

    texts: list[str]
    labels: list[str]
    sequences: Sequences


@dataclass(frozen=True, slots=True)
class Update:
    """How one pass of learning goes: beta and lambda of L_LLM, and the optimizer's settings.

    tau: texts whose score reaches it also teach understanding.
    batch: texts a step for understanding; half as many are written, a quarter regularise. The
        label word is one token and teaches little, while a written text is scored at every token.
    """

    beta: float = 1.0
    reg: float = 0.2
    tau: float = 0.3
    lr: float = 8e-3
    batch: int = 16
    steps: int = 30


class Llm:
    """A causal language model with an adapter.

    Attributes:
        adapter: the LoRA layers in the model.
        generic: token rows on which L_reg holds the model to its start.

    Raises:
        ConfigError: the task does not fit the tokenizer, or the targets not the model.
        OSError: the folder holds no model.
    """

    def __init__(
        self,
        model_dir: Path,
        task: TextTask,
        spec: LoraSpec,
        *,
        seed: int,
        generic: Sequence[str] = (),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.reader = TaskReader.from_folder(task, model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
        model.eval()
        self.adapter = Adapter(model, spec)
        self.adapter.load(start_factors(self.adapter.layout, seed))
        self._stops = self._stop_tokens()
        self.generic = self._tokens(generic) if generic else self._babble(64, seed=seed)

    def state(self) -> Factors:
        """The adapter's factors."""
        return self.adapter.factors()

    def load(self, factors: Factors) -> None:
        """Take up factors stored earlier.

        Raises:
            RemoteProtocolError: they are not for this model.
        """
        self.adapter.load(factors)

    def generate(
        self,
        labels: Sequence[str],
        *,
        seed: int,
        temperature: float = 0.9,
        top_p: float = 0.95,
        max_new_tokens: int = 40,
    ) -> Written:
        """Write one text for each of `labels`: x_i ~ p_theta( . | prompt(y_i)), up to a newline."""
        rows = [row.ids for row in self.reader.tokenizer.encode_batch(self._frames(labels))]
        new = self._sample(rows, seed, temperature, top_p, max_new_tokens)
        decoded = [self.reader.tokenizer.decode(row) for row in new]
        whole = [row + more for row, more in zip(rows, new, strict=True)]
        return Written(
            texts=[" ".join(text.split()) for text in decoded],
            labels=list(labels),
            sequences=Sequences(whole, [len(row) for row in rows]),
        )

    def probs(self, texts: Sequence[str], temperature: float = 1.0) -> F32:
        """Probability of each label, (n, labels)."""
        result: F32 = label_probs(
            self.adapter.model, self.reader, texts, temperature=temperature
        ).numpy()
        return result

    def accuracy(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """Share of texts put under the right label through the task's prompt."""
        return accuracy(self.adapter.model, self.reader, texts, labels)

    def update(
        self,
        written: Written,
        scores: Sequence[float],
        how: Update,
        *,
        seed: int,
        public: Sequence[str] = (),
        opinions: F32 | None = None,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> dict[str, float]:
        """Learn L_gen + beta L_und + lambda L_reg from scored texts; the mean of each loss.

        `public` texts with the small models' `opinions` (n, labels) join both sets: L_und takes the
        opinions as soft labels, L_gen the likeliest label with its probability as score.

        Raises:
            LocalProtocolError: scores or opinions do not pair up with texts, or lie outside [0, 1].
            FleetError: the loss is no longer a number; lower lr.

        Source: CrossLM (arXiv 2312.05842), equation 3 and the losses around it, as rebuilt in
        PAPERS.md 1 (b).
        """
        own = np.asarray(scores, dtype=np.float32)
        given = np.zeros((0, len(self.reader.words)), np.float32) if opinions is None else opinions
        if len(own) != len(written.texts) or not ((own >= 0) & (own <= 1)).all():
            raise LocalProtocolError("update needs one score in [0, 1] for every text")
        if given.shape != (len(public), len(self.reader.words)):
            raise LocalProtocolError("update needs one opinion on every public text")
        prompts, targets = self._to_understand(written, own, how.tau, public, given)
        written, s = self._to_write(written, own, public, given)
        draws = itertools.count(1)
        gen_rows, und_rows, reg_rows = (
            shuffled_batches(n, max(1, size), seed=seed + next(draws))
            for n, size in (
                (len(written.texts), how.batch // 2),
                (len(prompts), how.batch),
                (len(self.generic), how.batch // 4),
            )
        )
        sums = {"gen": 0.0, "und": 0.0, "reg": 0.0}

        def loss_of_step() -> torch.Tensor:
            parts = {}
            if written.texts:
                rows = next(gen_rows)
                parts["gen"] = generation_loss(self.adapter, written.sequences.pick(rows), s[rows])
            if prompts:
                rows = next(und_rows)
                parts["und"] = how.beta * understanding_loss(
                    self.adapter, self.reader, [prompts[i] for i in rows], targets[rows]
                )
            if how.reg > 0:
                generic = [self.generic[i] for i in next(reg_rows)]
                parts["reg"] = how.reg * regulariser(self.adapter, generic)
            for name, part in parts.items():
                sums[name] += float(part.detach())
            return torch.stack(list(parts.values())).sum()

        steps = how.steps if written.texts or prompts else 0
        losses = optimize(self.adapter, loss_of_step, steps=steps, lr=how.lr)
        for done, loss in enumerate(losses, start=1):
            if progress is not None:
                progress(done, steps, loss)
        return {name: total / max(1, steps) for name, total in sums.items()}

    def perplexity(self, rows: Sequence[Tokens]) -> float:
        """exp of the mean loss per token on token rows of at least two tokens."""
        with torch.inference_mode():
            batch = Sequences(list(rows), [1] * len(rows))
            return float(torch.exp(-token_log_probs(self.adapter.model, batch)[0].mean()))

    def _to_write(
        self, written: Written, scores: F32, public: Sequence[str], opinions: F32
    ) -> tuple[Written, torch.Tensor]:
        """What L_gen is taken over, and its scores: texts of its own and public ones."""
        usable = [i for i, text in enumerate(written.texts) if text]
        labels = [self.reader.task.labels[i] for i in opinions.argmax(axis=1)] if public else []
        frames = [row.ids for row in self.reader.tokenizer.encode_batch(self._frames(labels))]
        ends = [f" {text}\n" for text in public]
        bodies = [row.ids[:MOST_WRITTEN] for row in self.reader.tokenizer.encode_batch(ends)]
        mine = written.sequences.pick(usable)
        sequences = Sequences(
            mine.ids + [frame + body for frame, body in zip(frames, bodies, strict=True)],
            mine.starts + [len(frame) for frame in frames],
        )
        texts = [written.texts[i] for i in usable] + list(public)
        asked = [written.labels[i] for i in usable] + labels
        sure = opinions.max(axis=1) if public else opinions[:, 0]
        s = torch.from_numpy(np.concatenate([scores[usable], sure]).astype(np.float32))
        return Written(texts, asked, sequences), s

    def _to_understand(
        self, written: Written, scores: F32, tau: float, public: Sequence[str], opinions: F32
    ) -> tuple[list[Tokens], torch.Tensor]:
        """What L_und is taken over: S with the labels asked for, public texts with opinions."""
        n = len(self.reader.words)
        good = [i for i, score in enumerate(scores) if score >= tau and written.texts[i]]
        asked = [self.reader.label_index(written.labels[i]) for i in good]
        targets = np.concatenate([np.eye(n, dtype=np.float32)[asked], opinions])
        if 2 * len(set(targets.argmax(axis=1).tolist())) < n:
            return [], torch.zeros(0, n)  # texts of a label or two would teach only to say those
        texts = [written.texts[i] for i in good] + list(public)
        return self.reader.prompts(texts), torch.from_numpy(targets)

    def _frames(self, labels: Sequence[str]) -> list[str]:
        task = self.reader.task
        words = [task.words[self.reader.label_index(label)].strip() for label in labels]
        return [task.generation_prompt.replace("{label}", word) for word in words]

    def _stop_tokens(self) -> torch.Tensor:
        tokenizer = self.reader.tokenizer
        n = self.adapter.model.get_input_embeddings().num_embeddings
        ends = torch.zeros(n, dtype=torch.bool)
        for token in range(min(n, tokenizer.get_vocab_size())):
            ends[token] = "\n" in tokenizer.decode([token], skip_special_tokens=False)
        eos = self.adapter.model.config.eos_token_id
        for token in eos if isinstance(eos, list) else [eos]:
            if token is not None:
                ends[token] = True
        return ends

    def _tokens(self, texts: Sequence[str]) -> list[Tokens]:
        rows = [
            row.ids[: self.reader.max_tokens]
            for row in self.reader.tokenizer.encode_batch(list(texts))
        ]
        return [row for row in rows if len(row) > 1]

    def _babble(self, n: int, *, seed: int) -> list[Tokens]:
        # Without public text the start itself says what "generic" is: its own free writing.
        frame = self.reader.task.prompt.split("{text}", 1)[0]
        row = self.reader.tokenizer.encode(frame).ids or [0]
        with self.adapter.off():
            more = self._sample([row] * n, seed, 1.0, 1.0, 32)
        return [row + new for new in more if len(row) + len(new) > 1]

    def _sample(
        self, rows: list[Tokens], seed: int, temperature: float, top_p: float, limit: int
    ) -> list[Tokens]:
        # Rows of equal prompt length go together, so no padding enters the cache.
        rng = torch.Generator().manual_seed(seed)
        result: list[Tokens] = [[] for _ in rows]
        by_length = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        for _, group in itertools.groupby(by_length, key=lambda i: len(rows[i])):
            members = list(group)
            prompt = torch.tensor([rows[i] for i in members])
            with torch.inference_mode():
                new = self._continue(prompt, rng, temperature, top_p, limit)
            for i, row in zip(members, new, strict=True):
                result[i] = row
        return result

    def _continue(
        self,
        prompt: torch.Tensor,
        rng: torch.Generator,
        temperature: float,
        top_p: float,
        limit: int,
    ) -> list[Tokens]:
        cache = DynamicCache(config=self.adapter.model.config)
        new: list[Tokens] = [[] for _ in range(len(prompt))]
        alive = torch.arange(len(prompt))  # rows still writing; the cache holds only these
        ids = prompt
        for _ in range(limit):
            out = self.adapter.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            token = draw(out.logits[:, -1].float(), rng, temperature, top_p)  # (alive,)
            for row, value in zip(alive.tolist(), token.tolist(), strict=True):
                new[row].append(value)
            going = (~self._stops[token]).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.batch_select_indices(going)
                alive, token = alive[going], token[going]
            ids = token[:, None]
        return new


def draw(
    logits: torch.Tensor, rng: torch.Generator, temperature: float, top_p: float
) -> torch.Tensor:
    """Sample one token per row from the smallest set of tokens holding `top_p`, (B,)."""
    probs = torch.softmax(logits / temperature, dim=-1)  # (B, vocab)
    if top_p < 1.0:
        ordered, places = probs.topk(min(256, probs.shape[-1]), dim=-1)  # the head; tails are noise
        before = ordered.cumsum(dim=-1) - ordered
        ordered = torch.where(before < top_p, ordered, 0.0)
        return places.gather(1, torch.multinomial(ordered, 1, generator=rng))[:, 0]
    return torch.multinomial(probs, 1, generator=rng)[:, 0]


def generation_loss(adapter: Adapter, batch: Sequences, s: torch.Tensor) -> torch.Tensor:
    """L_gen = -mean_i mean_t [s_i log p(x_it) + (1 - s_i) log(1 - p(x_it))], s (B,).

    Its derivative by the logit of the written token is p - s (over N and |x_i|): it raises what the
    judges like, lowers what they do not, and rests where p equals s.
    """
    log_p, owner = token_log_probs(adapter.model, batch)
    return quality_loss(log_p, owner, s)


def quality_loss(log_p: torch.Tensor, owner: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The formula of L_gen on token log-probabilities (n,), each of sequence `owner` (n,)."""
    p = log_p.exp().clamp(max=MAX_P)
    per_token = -(s[owner] * log_p + (1 - s[owner]) * torch.log1p(-p))
    none = log_p.new_zeros(len(s))
    lengths = none.index_add(0, owner, torch.ones_like(log_p)).clamp(min=1)
    return none.index_add(0, owner, per_token).div(lengths).mean()


def understanding_loss(
    adapter: Adapter, reader: TaskReader, prompts: Sequence[Tokens], targets: torch.Tensor
) -> torch.Tensor:
    """L_und = -mean_i sum_j q_ij log p(word j | prompt i), targets q (B, labels)."""
    log_p = word_log_probs(adapter.model, reader, prompts)
    return -(targets * log_p).sum(dim=1).mean()


def regulariser(adapter: Adapter, rows: Sequence[Tokens]) -> torch.Tensor:
    """L_reg = mean over generic tokens of KL(p_theta0 || p_theta); theta0: the adapter off."""
    ids = padded(rows)
    owner = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    place = torch.tensor([t for row in rows for t in range(len(row))])
    with torch.no_grad(), adapter.off():
        start = torch.log_softmax(logits_at(adapter.model, ids, owner, place), dim=-1)
    now = torch.log_softmax(logits_at(adapter.model, ids, owner, place), dim=-1)
    return torch.nn.functional.kl_div(now, start, log_target=True, reduction="sum") / len(place)
