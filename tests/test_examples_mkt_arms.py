"""FedMKT's arms of the learning benchmark, on toy corpora and random models."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_examples_bench_learning import KNOBS, SIZES, sentences, tiny, write
from transformers import LlamaForCausalLM

from examples.learning import lab as lab_module
from examples.learning.deal import deal
from examples.learning.lab import Lab, Models
from examples.learning.mkt_arms import FEDMKT_ARMS, mutual
from examples.learning.programs import arms_of
from examples.learning.tasks import TASKS


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    torch.set_num_threads(1)

    def load(folder: Path, *, dtype: torch.dtype) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    monkeypatch.setattr(lab_module, "load_slm", load)
    monkeypatch.setattr(lab_module, "quickest_dtype", lambda: torch.float32)
    write(tmp_path, TASKS["sst2"].train.path, sentences(200, 1))
    write(tmp_path, TASKS["sst2"].test.path, sentences(40, 2))
    for name in ("slm", "llm"):
        (tmp_path / name).mkdir()
    found = Models("slm-a", tiny(tmp_path / "slm", 1), tiny(tmp_path / "llm", 2))
    dealt = deal(TASKS["sst2"], tmp_path, SIZES, seed=1, verified=False)
    return Lab(replace(TASKS["sst2"], steps=3), dealt, found, KNOBS, 1)


def test_every_arm_measures_both_models_and_ablations_differ(lab: Lab) -> None:
    found = {arm.ablation: arm.measure(lab) for arm in FEDMKT_ARMS}

    assert len(lab.dealt.public_labels) == len(lab.dealt.public) == SIZES.public
    for rows in found.values():
        assert {row.model for row in rows} == {"slm-a", "llm"}
    # the LLM that only teaches stays where it was
    start = lab.large(lab.llm_start)
    assert [row for row in found["llm-frozen"] if row.model == "llm"] == start


def test_an_arm_is_repeatable(lab: Lab) -> None:
    assert mutual(lab) == mutual(lab)


def test_arms_are_known_by_the_name_of_their_program() -> None:
    names = [arm.name for arm in arms_of(["fedmkt"])]
    assert names[-4:] == [
        "fedmkt", "fedmkt, labels-only", "fedmkt, teachers-shuffled", "fedmkt, llm-frozen",
    ]  # fmt: skip
