"""The fixed prompts."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sfumato.data.icons import Icon, IconSet
from sfumato.data.scenes import Composer, concepts, never_composed
from sfumato.evaluate.prompts import NEVER, OWN, SYNONYMS, make_prompts, read_prompts, thinned


def test_five_hundred_distinct_prompts_as_the_maker_makes_them() -> None:
    prompts = read_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 500
    assert [prompt.seed for prompt in prompts] == list(range(500))
    assert prompts == make_prompts()


def test_only_known_concepts_are_asked() -> None:
    nouns = set(concepts().values())
    assert {noun for prompt in read_prompts() for accepted in prompt.things for noun in accepted} == nouns


@pytest.mark.parametrize(("kind", "held_out"), [(OWN, False), (NEVER, True)])
def test_exactly_the_never_composed_are_held_out(kind: str, held_out: bool) -> None:
    blank = Icon("", "", (), "", None)  # type: ignore[arg-type]
    for prompt in read_prompts():
        if prompt.kind == kind:
            scene = prompt.scene([blank] * len(prompt.things), [0.0] * len(prompt.things))
            assert never_composed(scene) == held_out, prompt.text


def test_synonyms_stand_in_no_caption() -> None:
    words = {word for noun in concepts().values() for word in re.findall(r"[a-z]+", noun)}
    asked = [prompt.text for prompt in read_prompts() if prompt.kind == SYNONYMS]
    assert len(asked) == 42
    for text in asked:
        assert not words & set(text.split()[1:]), text


def test_text_says_what_is_expected() -> None:
    for prompt in read_prompts():
        for word in (*filter(None, prompt.colours), prompt.ground, prompt.style, prompt.place):
            assert word in prompt.text
        if prompt.kind != SYNONYMS and prompt.count == 1:
            assert all(accepted[0] in prompt.text for accepted in prompt.things)
        if prompt.group in {"left/right", "above/below"}:
            first, second = (prompt.text.index(accepted[0]) for accepted in prompt.things)
            assert first < second


def test_thinned_keeps_every_group() -> None:
    some = thinned(read_prompts(), 100)
    assert len(some) == 100
    assert Counter(p.group for p in some).keys() == Counter(p.group for p in read_prompts()).keys()
    with pytest.raises(ValueError, match="from 1 to 500"):
        thinned(read_prompts(), 501)


def test_composer_never_draws_a_held_out_prompt(shape_set: IconSet) -> None:
    import numpy as np

    composer, rng = Composer(shape_set, weights={"single": 0.5, "beside": 0.5}), np.random.default_rng(0)
    held = {prompt.text for prompt in read_prompts() if prompt.kind == NEVER}
    assert not held & {composer.sample(rng).caption for _ in range(500)}
