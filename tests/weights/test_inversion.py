"""Learned words: the layouts of their files, what the tower then says, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.models.clip import CLIPTextModel
from sfumato.text.tokenizer import ClipTokenizer, train_vocabulary
from sfumato.weights.adapters import Embedding, EmbeddingHost, Lexicon, read_embedding
from sfumato.weights.folder import load_folder, save_folder

from ..tiny_xl import tiny_xl
from .adapters_made import assert_near, assert_untouched, snapshot, tiny_tower, written

WIDTH = 24


def vectors(n: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn((n, width), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return train_vocabulary(["a red cat beside a cat-like car, two cats in style"] * 6, 540, max_length=16)


@pytest.fixture
def tower() -> CLIPTextModel:
    return tiny_tower()


def made(name: str, n: int = 1, seed: int = 0) -> Embedding:
    return Embedding(name, Path(f"{name}.pt"), vectors(n, seed))


def pickled(path: Path, content: Mapping[str, Any]) -> Path:
    torch.save(dict(content), path)
    return path


def web_ui(param: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": param,
        "name": "inner name",
        "step": 1500,
        "sd_checkpoint": "7460a6fa",
        "sd_checkpoint_name": "model",
    }


def test_every_layout_is_the_same_word(tmp_path: Path) -> None:
    table = vectors(3)
    files = {
        "pickled by the web UI": (pickled(tmp_path / "my-word.pt", web_ui({"*": table})), "my-word"),
        "the web UI's safetensors": (written(tmp_path / "EasyWord.safetensors", {"emb_params": table}), "EasyWord"),
        "diffusers' safetensors": (written(tmp_path / "learned_embeds.safetensors", {"<cat-toy>": table}), "<cat-toy>"),
        "a parameter": (pickled(tmp_path / "p.pt", web_ui({"*": nn.Parameter(table.clone())})), "p"),
        "diffusers' pickle": (pickled(tmp_path / "learned_embeds.bin", {"<cat-toy>": table}), "<cat-toy>"),
    }
    for what, (path, name) in files.items():
        embedding = read_embedding(path)
        assert (embedding.name, embedding.path) == (name, path), what
        assert torch.equal(embedding.vectors, table) and not embedding.vectors.requires_grad, what
        assert read_embedding(path, "other").name == "other"
    single = read_embedding(written(tmp_path / "one.safetensors", {"<one>": table[0]}))
    assert single.vectors.shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": vectors(2, width=768), "clip_g": torch.ones(2, 3, 4)}, r"clip_g.*float32 of shape \(2, 3, 4\)"),
        ({"<a>": vectors(1), "<b>": vectors(1)}, "no textual inversion with one trigger: 2 tensors: <a>, <b>"),
        ({"<a>": torch.ones(2, 3, 4)}, r"float32 of shape \(2, 3, 4\)"),
        ({"<a>": torch.ones(3, dtype=torch.int64)}, "int64 of shape"),
        ({"<a>": torch.full((1, WIDTH), torch.inf)}, "infinite numbers or NaN"),
        ({"<a>": torch.ones(0, WIDTH)}, "one vector"),
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path: Path, content: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"word.*{message}") as caught:
        read_embedding(written(tmp_path / "word.safetensors", content))
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_embedding(tmp_path / "gone.pt")


def test_the_ids_stand_for_the_vectors(tokenizer: ClipTokenizer, tower: CLIPTextModel) -> None:
    table = tower.text_model.embeddings.token_embedding
    old = table.weight.detach().clone()
    embeddings = [made("<toy>", 1, 1), made("My Style", 3, 2)]
    host = EmbeddingHost(tokenizer, tower)
    ours = host.apply(embeddings)
    assert ours is host.tokenizer and host.applied == ("<toy>", "My Style")
    assert torch.equal(table.weight[:540], old) and table.num_embeddings == 544
    assert torch.equal(table.weight[540:], torch.cat([e.vectors for e in embeddings]))
    plain = tokenizer(["a red cat"])[0].tolist()
    ids = ours(["a <TOY>, red   my\tSTYLE cat", "my styles <toy", "a red cat"]).tolist()
    comma = tokenizer([","])[0, 1].item()
    assert ids[0][:9] == [plain[0], plain[1], 540, comma, plain[2], 541, 542, 543, plain[3]]
    assert max(ids[1]) < 540 and ids[2] == plain
    with torch.no_grad():
        states = tower(torch.tensor(ids)).last_hidden_state
    assert torch.isfinite(states).all()


def test_taking_off_leaves_no_residue(tokenizer: ClipTokenizer, tower: CLIPTextModel) -> None:
    before, layer = snapshot(tower), tower.text_model.embeddings.token_embedding
    host = EmbeddingHost(tokenizer, tower)
    one, two, three = made("one"), made("two", 2), made("three", 4)
    host.apply([one, two, three])
    placed = layer.weight
    assert host.apply([one, two, three]) is host.tokenizer and layer.weight is placed
    assert host.apply([three, two]).expansions == {"three": (540, 541, 542, 543), "two": (544, 545)}
    assert torch.equal(layer.weight[540:], torch.cat([three.vectors, two.vectors]))
    assert host.apply([]) is tokenizer and host.applied == ()
    assert_untouched(before, tower)
    assert layer.num_embeddings == 540


def test_a_tower_that_is_moved_meanwhile(tokenizer: ClipTokenizer, tower: CLIPTextModel) -> None:
    host = EmbeddingHost(tokenizer, tower)
    host.apply([made("one")])
    tower.half()
    host.apply([made("two")])
    layer = tower.text_model.embeddings.token_embedding
    assert layer.weight.dtype == torch.float16 and layer.weight.shape[0] == 541
    host.apply([])
    assert all(p.dtype == torch.float16 for p in tower.parameters())


def test_what_does_not_fit_changes_nothing(tokenizer: ClipTokenizer, tower: CLIPTextModel) -> None:
    host = EmbeddingHost(tokenizer, tower)
    host.apply([made("one")])
    before, mine = snapshot(tower), host.tokenizer
    for wanted, message in (
        (
            [Embedding("w", Path("w.pt"), vectors(1, width=1024))],
            "1024 numbers, as Stable Diffusion 2 has it.*reads 24",
        ),
        ([made("w", 15)], "15 vectors, but a prompt has room for 14"),
        ([made("w"), made("w")], "'w' is taken by another"),
        ([made("w"), made("W ")], "given twice; case and blanks"),
        ([made(" ")], "give a word"),
    ):
        with pytest.raises(ValueError, match=message):
            host.apply(wanted)
    assert_untouched(before, tower)
    assert host.tokenizer is mine and host.applied == ("one",)


@pytest.mark.filterwarnings("ignore")
def test_the_states_are_diffusers(tmp_path: Path, tiny_folder: Path) -> None:
    import diffusers

    peer = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder), local_files_only=True)
    parts = load_folder(tiny_folder)
    assert isinstance(parts.text_encoder, CLIPTextModel) and isinstance(parts.tokenizer, ClipTokenizer)
    host = EmbeddingHost(parts.tokenizer, parts.text_encoder)
    paths = [
        written(tmp_path / "learned_embeds.safetensors", {"<cat-toy>": vectors(3, 3, 32)}),
        pickled(tmp_path / "frog_style.pt", web_ui({"*": vectors(1, 4, 32)})),
    ]
    embeddings = [read_embedding(path) for path in paths]
    for path, embedding in zip(paths, embeddings, strict=True):
        peer.load_textual_inversion(str(tmp_path), weight_name=path.name, token=embedding.name)
    ours = host.apply(embeddings)
    for prompt in ("a red <cat-toy> on blue", "two <cat-toy>, frog_style", "frog_style", "a red apple"):
        ids = ours([prompt])
        with torch.no_grad():
            states = parts.text_encoder(ids).last_hidden_state
            theirs, _ = peer.encode_prompt(prompt, "cpu", 1, False)
        assert_near(prompt, states, theirs)


# Two towers.


def test_a_word_for_two_towers(tmp_path: Path) -> None:
    """Both tables are longer for it, and both are the old ones afterwards."""
    parts = tiny_xl()
    first, second = parts.text_encoder, parts.text_encoder_2
    assert isinstance(first, CLIPTextModel) and isinstance(second, CLIPTextModel)
    widths = first.config.hidden_size, second.config.hidden_size
    content = {name: vectors(2, width=width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    word = read_embedding(written(tmp_path / "mood.safetensors", content))
    assert word.name == "mood" and word.second is not None and torch.equal(word.second, content["clip_g"])
    before = snapshot(first, second)
    lexicon = Lexicon(parts.towers)
    lexicon.apply([word])
    one, two = lexicon.tokenizers
    for tower, tokenizer, rows in ((first, one, content["clip_l"]), (second, two, content["clip_g"])):
        ids = tokenizer(["a mood cat"])[0].tolist()
        placed = [i for i in ids if i >= tower.config.vocab_size]
        assert len(placed) == 2 and torch.equal(tower.text_model.embeddings.token_embedding.weight[placed], rows)
    lexicon.apply([])
    assert_untouched(before, first, second)
    alone = read_embedding(written(tmp_path / "alone.safetensors", {"<a>": vectors(1, width=widths[0])}))
    with pytest.raises(ValueError, match="is an embedding for one text tower; this model reads with two"):
        lexicon.apply([alone])
    with pytest.raises(ValueError, match=r"two text towers \(clip_l, clip_g\), as SDXL has them; this model has one"):
        EmbeddingHost(parts.tokenizer, first).apply([word])  # type: ignore[arg-type]


def test_what_two_towers_say_of_a_word_in_diffusers(tmp_path: Path) -> None:
    import diffusers

    parts = tiny_xl()
    save_folder(parts, tmp_path / "model")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(str(tmp_path / "model"), local_files_only=True)
    content = {"clip_l": vectors(2, width=16), "clip_g": vectors(2, width=24)}
    peer.load_textual_inversion(content["clip_l"], "mood", text_encoder=peer.text_encoder, tokenizer=peer.tokenizer)
    other = {"text_encoder": peer.text_encoder_2, "tokenizer": peer.tokenizer_2}
    peer.load_textual_inversion(content["clip_g"], "mood", **other)
    with torch.no_grad():
        states, _, pooled, _ = peer.encode_prompt("a mood cat", do_classifier_free_guidance=False)
    lexicon = Lexicon(parts.towers)
    lexicon.apply([read_embedding(written(tmp_path / "mood.safetensors", content))])
    with torch.no_grad():
        mine = parts.towers.replaced(lexicon.tokenizers).condition("a mood cat")
    assert mine.context is not None and mine.pooled is not None
    assert_near("states", mine.context, states)
    assert_near("pooled", mine.pooled, pooled)
