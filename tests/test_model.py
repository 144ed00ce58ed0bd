"""The model against an independent one, and the published stories260K."""

import numpy as np
import pytest
import torch
from helpers import numpy_logits, plain_tiny, tiny

import export
import sample
from export import save_llama2c
from model import KVCache, ModelArgs, rope_tables, rotate
from spo import checkpoint
from spo.generate import generate
from spo.tokenizer import Tokenizer

GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.mark.parametrize("tied,n_kv_heads", [(True, 4), (True, 2), (False, 1)])
def test_logits_equal_an_independent_numpy_forward_pass_of_the_exported_file(
    tmp_path, tied, n_kv_heads
):
    model, path = plain_tiny(tied, n_kv_heads), str(tmp_path / "model.bin")
    save_llama2c(path, model)
    tokens = [1, 9, 33, 7, 60, 2]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))
    assert logits.shape == (1, 6, 64)
    np.testing.assert_allclose(logits[0, -1].numpy(), numpy_logits(path, tokens), atol=2e-4)


def test_rope_turns_interleaved_pairs_by_position():
    args = ModelArgs(dim=4, n_heads=1, max_seq_len=3)
    cos, sin = rope_tables(args)
    turned = rotate(torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 3, 1, 4), cos, sin)[0, 2, 0]
    angles = np.array([2.0, 2.0 / 100.0])  # position 2; theta^(-0/4) and 10000^(-2/4)
    assert turned.tolist() == pytest.approx(
        [np.cos(angles[0]), np.sin(angles[0]), np.cos(angles[1]), np.sin(angles[1])]
    )


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_the_cache_changes_nothing(n_kv_heads):
    """Several tokens at first, then one at a time, against all at once."""
    model = plain_tiny(n_kv_heads=n_kv_heads)
    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.args, 3, 12, "cpu", torch.float32)
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(tokens[:, :5], cache)]
        parts += [model(tokens[:, t : t + 1], cache) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_model_that_is_made_fast_gives_the_same_logits_and_gradients():
    plain, made_fast = plain_tiny().double(), tiny().double()
    tokens = torch.randint(64, (3, 40), generator=torch.Generator().manual_seed(0))
    for model in (plain, made_fast):
        model(tokens).square().mean().backward()
    torch.testing.assert_close(made_fast(tokens), plain(tokens))
    for a, b in zip(made_fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_weights_from_scratch_have_the_scale_of_their_fan_in():
    model = tiny(dim=128, hidden_dim=256)
    model.init_weights(torch.Generator().manual_seed(0))
    layer = model.layers[1]
    residual = (2 * model.args.n_layers) ** 0.5
    for weight, std in (
        (layer.attention.wq.weight, 128**-0.5),
        (layer.attention.wo.weight, 128**-0.5 / residual),
        (layer.feed_forward.w1.weight, 128**-0.5),
        (layer.feed_forward.w2.weight, 256**-0.5 / residual),
        (model.tok_embeddings.weight, 128**-0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
    again = tiny(dim=128, hidden_dim=256)
    again.init_weights(torch.Generator().manual_seed(0))
    assert torch.equal(again.output.weight, model.output.weight)


# --- the published stories260K -------------------------------------------------------------------


def test_stories260k_tells_its_known_story(spo_data, capsys):
    sample.main(
        [
            f"--checkpoint={spo_data}/stories260K.bin",
            f"--tokenizer={spo_data}/tok512.model",
            "--temperature=0",
        ]
    )
    assert " ".join(capsys.readouterr().out.split()).startswith(GREEDY)


def test_stories260k_is_exported_to_the_identical_file(spo_data, tmp_path, capsys):
    path = str(tmp_path / "model.bin")
    export.main(
        [path, f"--checkpoint={spo_data}/stories260K.bin", f"--tokenizer={spo_data}/tok512.model"]
    )
    assert open(path, "rb").read() == open(f"{spo_data}/stories260K.bin", "rb").read()
    assert (tmp_path / "tokenizer.bin").read_bytes() == open(f"{spo_data}/tok512.bin", "rb").read()


def test_an_independent_reader_of_the_file_tells_the_same_greedy_story(spo_data):
    model, ids = checkpoint.load(f"{spo_data}/stories260K.bin"), [1]
    ours = generate(model, [[1]], 40, temperature=0)[0]
    for _ in range(40):
        ids.append(int(numpy_logits(f"{spo_data}/stories260K.bin", ids).argmax()))
    assert ids[1:] == ours


def test_llama2_tokenizer_is_exported_to_the_identical_file(spo_data, tmp_path):
    with open(f"{spo_data}/tokenizer.bin", "rb") as f:
        assert Tokenizer(f"{spo_data}/tokenizer.model").to_llama2c() == f.read()


def test_the_hidden_width_is_llama2c_s():
    """2/3 of 4 * dim, up to a multiple: 11,008 of Llama-2-7B, 768 of stories15M, 172 of 260K."""
    assert ModelArgs(dim=4096).hidden_dim == 11008
    assert ModelArgs(dim=288, n_heads=6, multiple_of=32).hidden_dim == 768
    assert ModelArgs(dim=64, n_heads=8, multiple_of=4).hidden_dim == 172
