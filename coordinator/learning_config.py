"""The settings of what is learned: the program, adapters, defence, the LLM, FedMKT.

Knows what each means, its unit and its range. Does not know the file they stand in (config.py) or
what they are used for.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

PathText = Annotated[str, Meta(max_length=4096)]
"""A path; empty means none."""

EVERY_LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Adapting every linear learns most: 0.58 where q and v alone reached 0.49 (Dolly, 160 steps)."""


class ProgramSection(Struct, frozen=True, forbid_unknown_fields=True):
    """Which algorithm runs over how many devices, and how patiently."""

    name: Annotated[Literal["crosslm", "fedavg", "fedmkt"], Meta(description="The algorithm.")] = (
        "crosslm"
    )
    cohort: Annotated[
        int, Meta(ge=1, le=100_000, description="Enrolled devices to wait for before it starts.")
    ] = 1
    rounds: Annotated[int, Meta(ge=1, le=1_000_000, description="Rounds to run.")] = 3
    need: Annotated[
        int, Meta(ge=0, le=100_000, description="Updates that complete a round; 0 means all.")
    ] = 0
    within_s: Annotated[
        float,
        Meta(gt=0, le=31 * 86_400, description="Seconds without progress before a round fails."),
    ] = 120.0
    retries: Annotated[
        int,
        Meta(ge=0, le=1000, description="Repetitions of a failed round before the program ends."),
    ] = 1
    seed: Annotated[int, Meta(ge=0, le=2**31 - 1, description="Seed of everything random.")] = 0
    samples: Annotated[
        int, Meta(ge=1, le=100_000, description="Texts the LLM writes per round (CrossLM's N).")
    ] = 96
    tau: Annotated[
        float, Meta(ge=0, le=1, description="Least score of a text that is kept (CrossLM's tau).")
    ] = 0.3
    temperature: Annotated[
        float, Meta(gt=0, le=5, description="Sampling temperature of the LLM.")
    ] = 0.9
    more_temperatures: Annotated[
        tuple[Annotated[float, Meta(gt=0, le=5)], ...],
        Meta(
            max_length=16,
            description="Further temperatures; texts then go to those that were of use (OSCA).",
        ),
    ] = ()
    frozen_writer: Annotated[
        bool, Meta(description="Let the LLM as it was at the start write too; OSCA divides.")
    ] = False
    top_p: Annotated[float, Meta(gt=0, le=1, description="Nucleus of the LLM's sampling.")] = 0.95
    max_new_tokens: Annotated[
        int, Meta(ge=1, le=4096, description="Longest text the LLM writes, in tokens.")
    ] = 28
    pool: Annotated[
        int, Meta(ge=1, le=100_000, description="Most synthetic texts kept; the best stay.")
    ] = 512
    llm_share: Annotated[
        float, Meta(ge=0, le=1, description="Share of the LLM in distillation's soft labels.")
    ] = 0.3
    distil_steps: Annotated[
        int, Meta(ge=0, le=1_000_000, description="Steps of distillation a round; 0 leaves it out.")
    ] = 40
    distil_lr: Annotated[float, Meta(gt=0, le=1, description="Its learning rate.")] = 2e-3
    patience: Annotated[
        int,
        Meta(ge=0, le=1000, description="Rounds without gain that end CrossLM's run; 0: never."),
    ] = 0
    score_on_devices: Annotated[
        bool, Meta(description="Let the devices score, instead of their replicas here.")
    ] = False
    learn_codec: Annotated[
        bool,
        Meta(
            description="Fit the learned codec on the first round's updates, if adapters go down "
            "whole; with adapter.down_ratio it follows the differences and needs no fit."
        ),
    ] = True


class AdapterSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the LoRA adapters that travel, and how devices train them."""

    rank: Annotated[int, Meta(ge=1, le=256, description="Rank r of the adapters.")] = 8
    alpha: Annotated[float, Meta(gt=0, le=4096, description="Scale: alpha / r before B·A.")] = 16.0
    targets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(min_length=1, max_length=64, description="Last names of the adapted modules."),
    ] = EVERY_LINEAR
    steps: Annotated[int, Meta(ge=1, le=1_000_000, description="Device steps a round.")] = 60
    batch: Annotated[int, Meta(ge=1, le=4096, description="Examples a step.")] = 16
    lr: Annotated[float, Meta(gt=0, le=1, description="Learning rate on devices.")] = 3e-3
    synthetic_weight: Annotated[
        float, Meta(ge=0, le=10, description="Weight of synthetic texts on devices (CrossLM's mu).")
    ] = 0.5
    ratio: Annotated[
        float,
        Meta(ge=0, le=10_000, description="Compress updates to 1/ratio of float32; 0: no target."),
    ] = 16.0
    down_ratio: Annotated[
        float,
        Meta(
            ge=0,
            le=10_000,
            description="Send the new adapter as its change, in 1/down_ratio of float32, 2 or more "
            "(the coordinator then goes on with what devices read); 0: whole, as float16.",
        ),
    ] = 20.0


class DefenceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What one device may do to all: bounds on its updates, and what its faults cost it."""

    aggregation: Annotated[
        Literal["auto", "mean", "geometric-median"],
        Meta(
            description="geometric-median withstands hostile devices below the bounds, as long as "
            "they have less than half of the weight; auto: that from five updates on, else mean."
        ),
    ] = "auto"
    clip: Annotated[
        float,
        Meta(ge=1, le=1000, description="A change counts at most this many times the median's."),
    ] = 3.0
    refuse: Annotated[
        float,
        Meta(
            ge=0,
            le=1e6,
            description="One this many times the median's is left out and is a fault; 0: never.",
        ),
    ] = 30.0
    max_norm: Annotated[
        float,
        Meta(gt=0, le=1e9, description="Norm of a change of B·A beyond which it is refused."),
    ] = 1e4
    examples: Annotated[
        float,
        Meta(
            ge=1,
            le=1e6,
            description="A device weighs at most this many times the median number of examples; "
            "the numbers are the devices' own words.",
        ),
    ] = 1.0
    max_drop: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="A round is rolled back if accuracy falls by more than this and chance; "
            "1 keeps every round. Measured on [evaluation], and by the median device.",
        ),
    ] = 0.05
    judged: Annotated[
        int,
        Meta(ge=0, le=100_000, description="Texts of [evaluation] that judge a round; 0: none."),
    ] = 200
    faults: Annotated[
        int,
        Meta(ge=1, le=10_000, description="Malformed or outsized messages before quarantine."),
    ] = 5
    fault_days: Annotated[
        float, Meta(gt=0, le=3650, description="Days after which a fault is forgotten.")
    ] = 7.0
    quarantine_hours: Annotated[
        float,
        Meta(ge=0, le=87_600, description="How long it lasts; 0: until `device approve`."),
    ] = 0.0


class LlmSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The large model that writes and is taught. fedavg does without."""

    path: Annotated[PathText, Meta(description="Hugging Face folder of the LLM; empty: none.")] = ""
    rank: Annotated[int, Meta(ge=1, le=256, description="Rank of the LLM's own adapter.")] = 8
    alpha: Annotated[float, Meta(gt=0, le=4096, description="Its scale.")] = 16.0
    targets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=128)], ...],
        Meta(min_length=1, max_length=64, description="Last names of its adapted modules."),
    ] = EVERY_LINEAR
    lr: Annotated[float, Meta(gt=0, le=1, description="Learning rate of the LLM.")] = 8e-3
    steps: Annotated[int, Meta(ge=1, le=1_000_000, description="LLM steps a round.")] = 30
    batch: Annotated[int, Meta(ge=1, le=4096, description="Texts a step.")] = 16
    beta: Annotated[float, Meta(ge=0, le=100, description="Weight of understanding.")] = 1.0
    reg: Annotated[float, Meta(ge=0, le=100, description="Weight of staying as it was.")] = 0.2
    verify: Annotated[
        bool,
        Meta(
            description="Say of devices' drafts what this model takes (cloud drafts). Prompts then "
            "arrive here as token ids, from devices that switched it on as well."
        ),
    ] = False


class FedMktSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What FedMKT does with the labelled texts of [public]; how the LLM learns is in [llm]."""

    share: Annotated[
        float, Meta(ge=0, le=1, description="Weight of the labels (lambda); teachers: the rest.")
    ] = 0.9
    kept: Annotated[int, Meta(ge=1, le=128, description="Likeliest tokens told of a place.")] = 16
    whole: Annotated[
        bool, Meta(description="Teach every token of the texts, not the label's word alone.")
    ] = False
    direction: Annotated[
        Literal["both", "to-llm", "to-slms"], Meta(description="Who learns; to-slms is LLM2SLM.")
    ] = "both"
    align: Annotated[
        Literal["dtw", "greedy"],
        Meta(description="dtw: cheapest warping, as in the paper; greedy: tokens of equal start."),
    ] = "dtw"
    ask_devices: Annotated[
        bool, Meta(description="Devices tell what they find likeliest; else replicas do, here.")
    ] = True
    teach_on_devices: Annotated[
        bool,
        Meta(
            description="Devices align and learn what the LLM says (as published); else it is done "
            "here, to each family's average, without a second training there and uncoded."
        ),
    ] = False
    steps: Annotated[int, Meta(ge=0, le=1_000_000, description="Small models' steps.")] = 30
    batch: Annotated[int, Meta(ge=1, le=4096, description="Texts a step.")] = 8
    lr: Annotated[float, Meta(gt=0, le=1, description="Their learning rate.")] = 2e-3
    held_out: Annotated[
        int,
        Meta(ge=0, le=1000, description="Every n-th public text only judges rounds; 0: none."),
    ] = 5
    max_rise: Annotated[
        float,
        Meta(
            ge=0,
            le=100,
            description="A model is taken back if its bits per byte of held-out texts rise by "
            "more than this share of its best; training on few labels alone raises them a little.",
        ),
    ] = 0.5
    patience: Annotated[
        int,
        Meta(ge=0, le=1000, description="Rounds without gain that end the run; 0: never."),
    ] = 0
    stale_rounds: Annotated[
        int, Meta(ge=0, le=1000, description="Rounds that a device's rows go on teaching.")
    ] = 8
