"""The vocabularies in the package are the published ones."""

from __future__ import annotations

from sfumato.text.standard import bert_tokenizer, clip_tokenizer


def test_clip() -> None:
    """Ids that OpenAI's CLIP gives, as its documentation and the published model folders have them."""
    tokenizer = clip_tokenizer()
    assert (len(tokenizer), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49408, 49406, 49407, 49407)
    assert tokenizer(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert clip_tokenizer("!")(["a photo of a cat"])[0, 6:9].tolist() == [49407, 0, 0]


def test_bert() -> None:
    assert bert_tokenizer()(["a photo of a cat"])[0, :8].tolist() == [101, 1037, 6302, 1997, 1037, 4937, 102, 0]
