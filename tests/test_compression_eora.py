"""compression: the branch is the optimum it claims to be, in both norms, and never harms."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from compression.eora import (
    branch,
    concatenate,
    diagonal_root,
    eigen_root,
    merge,
    one_pass,
    output_error,
    probe,
    second_moment,
    sketch,
    sketch_root,
)
from compression.eora_torch import branches_on, calibrate, covariances, groups
from compression.errors import WeightsError
from compression.quantize import gptq, prune_2_4, rtn, sparse_gpt_2_4

OUT, WIDTH, TOKENS = 40, 56, 600
RANKS = (1, 4, 16, 32)
F64 = np.ndarray


@pytest.fixture(scope="module")
def inputs() -> F64:
    """Inputs whose directions differ a hundredfold in size and are not the axes."""
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))
    return rng.standard_normal((TOKENS, WIDTH)) * np.geomspace(10, 0.1, WIDTH) @ turn


@pytest.fixture(scope="module")
def weight() -> F64:
    return np.random.default_rng(2).standard_normal((OUT, WIDTH))


@pytest.fixture(scope="module")
def error(weight: F64) -> F64:
    return weight - rtn(weight, 3)


def papers_form(D: F64, C: F64, rank: int) -> F64:
    """BA by Algorithm 1 as printed: with S^-1."""
    values, Q = np.linalg.eigh(C)
    S, S_inverse = Q * np.sqrt(values), (Q / np.sqrt(values)).T
    U, sigma, Vt = np.linalg.svd(D @ S, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank] @ S_inverse


def qera_exact(D: F64, C: F64, rank: int) -> F64:
    """BA with the symmetric square root (Zhang et al. 2024, arXiv 2410.06040, Theorem 1)."""
    values, Q = np.linalg.eigh(C)
    root, inverse = (Q * np.sqrt(values)) @ Q.T, (Q / np.sqrt(values)) @ Q.T
    U, sigma, Vt = np.linalg.svd(D @ root, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank] @ inverse


@pytest.mark.parametrize("rank", RANKS)
def test_the_output_error_is_the_tail_of_the_singular_values(
    error: F64, inputs: F64, rank: int
) -> None:
    C = second_moment(inputs)
    sigma = np.linalg.svd(error @ eigen_root(C), compute_uv=False)

    A, B = branch(error, rank, eigen_root(C))

    measured = np.linalg.norm(inputs @ (error - B @ A).T) ** 2
    np.testing.assert_allclose(measured, (sigma[rank:] ** 2).sum(), rtol=1e-11)
    np.testing.assert_allclose(output_error(error, C, A, B), measured, rtol=1e-10)


@pytest.mark.parametrize("rank", RANKS)
def test_eora_wins_on_outputs_and_plain_svd_on_weights(error: F64, inputs: F64, rank: int) -> None:
    C = second_moment(inputs)
    roots = {"eora": eigen_root(C), "act-s": diagonal_root(C), "svd": None}

    found = {name: branch(error, rank, root) for name, root in roots.items()}

    outputs = {name: output_error(error, C, *pair) for name, pair in found.items()}
    weights = {name: np.linalg.norm(error - B @ A) for name, (A, B) in found.items()}
    assert outputs["eora"] < min(outputs["act-s"], outputs["svd"])
    assert max(outputs.values()) < output_error(error, C)
    assert weights["svd"] < min(weights["act-s"], weights["eora"])


@pytest.mark.parametrize("form", [papers_form, qera_exact])
@pytest.mark.parametrize("rank", RANKS)
def test_it_equals_the_papers_form_and_qera_exact(
    error: F64, inputs: F64, rank: int, form: Callable[[F64, F64, int], F64]
) -> None:
    C = second_moment(inputs)

    A, B = branch(error, rank, eigen_root(C))

    np.testing.assert_allclose(B @ A, form(error, C, rank), atol=1e-12)


def test_full_rank_leaves_no_error_on_what_was_seen(error: F64, inputs: F64) -> None:
    A, B = branch(error, OUT, eigen_root(second_moment(inputs)))

    assert np.abs(inputs @ (error - B @ A).T).max() < 1e-12 * np.abs(inputs).max()


@pytest.mark.parametrize("rank", RANKS)
def test_with_isotropic_inputs_it_is_plain_svd(error: F64, rank: int) -> None:
    A, B = branch(error, rank, eigen_root(7.0 * np.eye(WIDTH)))
    low, high = branch(error, rank)

    np.testing.assert_allclose(B @ A, high @ low, atol=1e-12)


def test_fewer_tokens_than_inputs_do_no_harm_seen_or_unseen(error: F64, inputs: F64) -> None:
    seen, unseen = inputs[:20], inputs[20:]
    root = eigen_root(second_moment(seen))

    A, B = branch(error, 30, root)

    assert root.shape == (WIDTH, 20)
    assert np.isfinite(A).all()
    assert np.isfinite(B).all()
    assert np.abs(seen @ (error - B @ A).T).max() < 1e-10
    lengths = [np.linalg.norm(unseen @ left.T, axis=1) for left in (error - B @ A, error)]
    assert (lengths[0] <= lengths[1] + 1e-12).all()


@pytest.mark.parametrize("C", [np.zeros((WIDTH, WIDTH)), -np.eye(WIDTH)])
def test_moments_without_positive_eigenvalues_give_the_zero_branch(error: F64, C: F64) -> None:
    A, B = branch(error, 4, eigen_root(C))

    assert not A.any()
    assert not B.any()


def test_ranks_beyond_the_error_are_zero_and_factors_are_balanced(error: F64) -> None:
    A, B = branch(error, 50)

    assert (A.shape, B.shape) == ((50, WIDTH), (OUT, 50))
    assert not A[OUT:].any()
    np.testing.assert_allclose(np.linalg.norm(A, axis=1), np.linalg.norm(B, axis=0), atol=1e-12)


def test_devices_sums_give_the_pooled_branch_whatever_the_order(error: F64, inputs: F64) -> None:
    parts = [{"l": second_moment(x)} for x in np.split(inputs, [50, 51, 300])]
    pooled = branch(error, 8, eigen_root(second_moment(inputs)))

    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = merge(parts[i] for i in order)
        A, B = branch(error, 8, eigen_root(merged["l"]))
        np.testing.assert_allclose(B @ A, pooled[1] @ pooled[0], atol=1e-11)


def test_sketches_add_up_and_lose_little(error: F64, inputs: F64) -> None:
    omega = probe("l", WIDTH, 24, seed=5)
    parts = [{"l": sketch(second_moment(x), omega)} for x in np.split(inputs, 3)]
    C = second_moment(inputs)

    merged = merge(parts)["l"]

    np.testing.assert_allclose(merged, sketch(C, omega), rtol=1e-9, atol=1e-9)
    assert np.array_equal(omega, probe("l", WIDTH, 24, seed=5))
    found = output_error(error, C, *branch(error, 8, sketch_root(merged, omega)))
    best = output_error(error, C, *branch(error, 8, eigen_root(C)))
    blind = output_error(error, C, *branch(error, 8))
    assert best <= found < best + 0.1 * (blind - best)


def test_a_sketch_as_wide_as_the_inputs_rank_is_exact(error: F64, inputs: F64) -> None:
    C = second_moment(inputs[:20])
    omega = probe("l", WIDTH, 24, seed=5)

    A, B = branch(error, 8, sketch_root(sketch(C, omega), omega))

    best = output_error(error, C, *branch(error, 8, eigen_root(C)))
    np.testing.assert_allclose(output_error(error, C, A, B), best, rtol=1e-8)


def test_concatenated_adapters_add_up() -> None:
    rng = np.random.default_rng(3)

    def adapter(rank: int, *names: str) -> dict[str, np.ndarray]:
        made = {}
        for name in names:
            made[f"{name}.lora_A"] = rng.standard_normal((rank, 6)).astype(np.float32)
            made[f"{name}.lora_B"] = rng.standard_normal((5, rank)).astype(np.float32)
        return made

    eora, task = adapter(3, "p", "q"), adapter(2, "q")

    both, rank = concatenate((eora, 1.0), (task, 4.0))

    delta = both["q.lora_B"] @ both["q.lora_A"]
    expected = eora["q.lora_B"] @ eora["q.lora_A"] + 4 * task["q.lora_B"] @ task["q.lora_A"]
    assert rank == 5
    np.testing.assert_allclose(delta, expected, atol=1e-5)
    np.testing.assert_allclose(
        both["p.lora_B"] @ both["p.lora_A"], eora["p.lora_B"] @ eora["p.lora_A"], atol=1e-6
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: branch(np.zeros((3, 4)), -1),
        lambda: branch(np.zeros((3, 4)), 1, np.zeros((5, 5))),
        lambda: branch(np.full((3, 4), np.nan), 1),
        lambda: eigen_root(np.zeros((3, 4))),
        lambda: eigen_root(np.full((3, 3), np.inf)),
        lambda: merge([]),
        lambda: merge([{"a": np.zeros((2, 2))}, {"b": np.zeros((2, 2))}]),
        lambda: merge([{"a": np.zeros((2, 2))}, {"a": np.zeros((3, 3))}]),
        lambda: concatenate(({"a.lora_A": np.zeros((1, 2), np.float32)}, 1.0)),
        lambda: rtn(np.zeros((2, 4)), 1),
        lambda: prune_2_4(np.zeros((2, 6))),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(WeightsError):
        call()


# ---- the compressors


@pytest.mark.parametrize(("bits", "block"), [(4, 0), (3, 8), (3, 10), (8, 0)])
def test_rounding_stays_on_a_grid_of_few_values(weight: F64, bits: int, block: int) -> None:
    rounded = rtn(weight, bits, block=block)

    first = rounded[0, : block or WIDTH]
    assert len(np.unique(first)) <= 2**bits
    step = np.abs(weight[0, : block or WIDTH]).max() / 2 ** (bits - 1)
    # The wide end is the largest value's; at the other end the grid lacks one step.
    assert np.abs(first - weight[0, : block or WIDTH]).max() <= step + 1e-12


def test_gptq_has_the_smaller_output_error_and_rtn_the_smaller_weight_error(
    weight: F64, inputs: F64
) -> None:
    C = second_moment(inputs)
    for block in (0, 14):
        plain, walked = rtn(weight, 3, block=block), gptq(weight, C, 3, block=block)

        assert output_error(weight - walked, C) < 0.6 * output_error(weight - plain, C)
        assert np.linalg.norm(weight - plain) < np.linalg.norm(weight - walked)


def test_pruning_keeps_two_of_four_and_better_methods_lose_less(weight: F64, inputs: F64) -> None:
    C = second_moment(inputs)
    kept = [prune_2_4(weight), prune_2_4(weight, C), sparse_gpt_2_4(weight, C)]

    for pruned in kept:
        assert ((pruned.reshape(OUT, -1, 4) != 0).sum(axis=2) == 2).all()
    magnitude, wanda, sparse_gpt = (output_error(weight - p, C) for p in kept)
    assert sparse_gpt < min(magnitude, wanda)


# ---- in a model


def _tiny(family: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(7)
    torch.set_num_threads(1)
    kind = getattr(transformers, f"{family}ForCausalLM")
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 64,
    }  # fmt: skip
    model = kind(kind.config_class(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.15 * torch.randn_like(value))
    return model


def _linears(model: torch.nn.Module) -> list[str]:
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, torch.nn.Linear) and ".layers." in n]


def _batches(rows: int = 12) -> list[torch.Tensor]:
    ids = torch.randint(1, 64, (rows, 24), generator=torch.Generator().manual_seed(1))
    return list(ids.split(5))


def _compress(name: str, layer: torch.nn.Linear, _: F64) -> F64:
    W = layer.weight.detach().double().numpy().copy()
    layer.weight.copy_(torch.from_numpy(rtn(W, 3)).float())
    return W - rtn(W, 3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Qwen3", {}),
        ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}),
        ("Phi", {"num_key_value_heads": 2}),
    ],
)
def test_the_walk_sees_what_a_whole_pass_sees(family: str, changes: dict[str, object]) -> None:
    """With every earlier layer compensated at full rank, inputs are those of the original."""
    model = _tiny(family, **changes)
    names, batches = _linears(model), _batches()
    expected = covariances(model, batches, names)
    seen = {}

    def watch(name: str, layer: torch.nn.Linear, C: F64) -> F64:
        seen[name] = C
        return _compress(name, layer, C)

    factors = calibrate(model, batches, names, watch, rank=48)

    for name, C in expected.items():
        np.testing.assert_allclose(seen[name], C, rtol=1e-3, atol=1e-3 * np.abs(C).max())
    assert set(factors) == {f"{n}.lora_{side}" for n in names for side in "AB"}


def test_layers_that_read_the_same_tensor_are_found() -> None:
    model = _tiny("Llama")

    found = groups(model, _linears(model), _batches()[0])

    leaves = [tuple(name.rsplit(".", 1)[1] for name in group) for group in found]
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert leaves == 2 * block


def test_later_layers_are_calibrated_behind_compensated_ones() -> None:
    names = _linears(_tiny("Llama"))
    seen: dict[int, list[F64]] = {0: [], 4: []}
    for rank, moments in seen.items():

        def watch(name: str, layer: torch.nn.Linear, C: F64, moments: list[F64] = moments) -> F64:
            moments.append(C)
            return _compress(name, layer, C)

        calibrate(_tiny("Llama"), _batches(), names, watch, rank=rank)

    assert np.array_equal(seen[0][0], seen[4][0])  # nothing comes before the first layer
    assert not np.allclose(seen[0][-1], seen[4][-1], rtol=1e-3)


def test_the_branch_comes_off_to_the_last_bit() -> None:
    model, ids = _tiny("Llama"), _batches()[0]
    factors = calibrate(model, _batches(), _linears(model), _compress, rank=4)

    with torch.no_grad():
        base = model(ids).logits
        with branches_on(model, factors):
            assert not torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)


def test_federated_moments_of_a_model_give_the_pooled_branches() -> None:
    model, names, batches = _tiny("Llama"), _linears(_tiny("Llama")), _batches()
    errors = {}
    with torch.no_grad():
        for name in names:
            errors[name] = _compress(name, model.get_submodule(name), np.zeros((1, 1)))
    grouped = groups(model, names, batches[0])

    def made(moments: dict[str, F64]) -> dict[str, np.ndarray]:
        roots = {name: eigen_root(C) for name, C in moments.items()}
        return one_pass(errors, roots, grouped, rank=4)

    pooled = made(covariances(model, batches, names))
    summed = made(merge(covariances(model, [batch], names) for batch in reversed(batches)))

    for name in names:
        A, B = f"{name}.lora_A", f"{name}.lora_B"
        np.testing.assert_allclose(summed[B] @ summed[A], pooled[B] @ pooled[A], atol=1e-4)


def test_a_layer_that_is_not_there_is_named() -> None:
    model = _tiny("Llama")

    with pytest.raises(WeightsError, match=r"model\.layers\.9\.mlp\.up_proj"):
        covariances(model, _batches(), ["model.layers.9.mlp.up_proj"])
    with pytest.raises(WeightsError, match=r"lm_head.*never run"):
        groups(model, ["lm_head"], _batches()[0])
