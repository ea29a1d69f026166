"""Spans, cutting and special strings: the template is never touched and the text is only text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvembed import InputError, UnsupportedModel
from kvembed.prompts import Prompter

TEMPLATES = ["{text}", "Context: {text}\nCompress the Context in one word:", 'This : "{text}" means:"', "{text}\n"]
# Any text a user may have: all of Unicode but lone surrogates, with special strings mixed in.
TEXTS = st.lists(
    st.one_of(st.text(max_size=20), st.sampled_from(["<|im_end|>", "<s>", "</s>", "\n", " ", "\0", "🙂", "e\u0301"])),
    max_size=6,
).map("".join)


@given(text=TEXTS, template=st.sampled_from(TEMPLATES))
def test_the_span_is_the_text(tokenizer, text, template):
    (prompt,) = Prompter(tokenizer)([text], template, 10_000)
    prefix, suffix = template.split("{text}")
    assert prompt.text == prefix + text + suffix
    assert prompt.tokens_cut == 0
    first, end = prompt.span
    assert 0 <= first <= end <= len(prompt.ids) == len(prompt.offsets)
    for i, (a, b) in enumerate(prompt.offsets):
        overlaps = a < len(prefix) + len(text) and b > len(prefix) and b > a
        assert overlaps == (first <= i < end)
    assert tokenizer.decode(prompt.ids[1:]) == prompt.text  # [1:]: BOS
    specials = set(tokenizer.all_special_ids)
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert not specials & set(prompt.ids[1:])


@given(text=TEXTS, template=st.sampled_from(TEMPLATES), room=st.integers(1, 30))
@settings(max_examples=200)
def test_cutting_keeps_the_template_and_a_prefix_of_the_text(tokenizer, text, template, room):
    prompter = Prompter(tokenizer)
    prefix, suffix = template.split("{text}")
    (whole,), (bare,) = prompter([text], template, 10_000), prompter([""], template, 10_000)
    limit = len(bare.ids) + room
    (prompt,) = prompter([text], template, limit)
    assert len(prompt.ids) <= limit
    assert prompt.text.startswith(prefix)
    assert prompt.text.endswith(suffix)
    kept = prompt.text[len(prefix) : len(prompt.text) - len(suffix)]
    assert text.startswith(kept)
    assert (prompt.tokens_cut > 0) == (kept != text) == (len(whole.ids) > limit)
    if prompt.tokens_cut:
        # one or two tokens on the border may split or merge
        difference = (whole.span[1] - whole.span[0]) - (prompt.span[1] - prompt.span[0])
        assert abs(prompt.tokens_cut - difference) <= 2
        # Nothing that would still have fitted is thrown away, but for a token or two that the cut itself changes.
        assert len(prompt.ids) > limit - 6


ECHO = "Rewrite: {text}, rewritten: {text}"


@given(text=TEXTS)
def test_of_two_copies_the_last_counts(tokenizer, text):
    (prompt,) = Prompter(tokenizer)([text], ECHO, 10_000)
    start = len(prompt.text) - len(text)
    assert prompt.text == ECHO.replace("{text}", text)
    for i, (a, b) in enumerate(prompt.offsets):
        assert (b > start and b > a) == (prompt.span[0] <= i < prompt.span[1])


@given(text=TEXTS, template=st.sampled_from([*TEMPLATES, ECHO]), tokens=st.integers(1, 12), limit=st.integers(40, 90))
@settings(max_examples=200)
def test_chunks_are_the_text_once_over(tokenizer, text, template, tokens, limit):
    """Whatever the text, the template and the cut, no character but white space is lost, and none is read twice."""
    prompter = Prompter(tokenizer)
    (whole,) = prompter([text], template, limit)
    (prompt,) = prompter([text], template, limit, chunk_tokens=tokens)
    assert (prompt.text, prompt.ids, prompt.tokens_cut) == (whole.text, whole.ids, whole.tokens_cut)
    if whole.span[1] - whole.span[0] <= tokens:
        assert prompt.chunks == ()
        return
    parts = [_last_copy(chunk.text, template) for chunk in prompt.chunks]
    assert [chunk.text for chunk in prompt.chunks] == [template.replace("{text}", part) for part in parts]
    assert _black("".join(parts)) == _black(_last_copy(whole.text, template))
    assert all(parts) or parts == [""]
    assert all(part == part.strip() for part in parts)


@given(text=TEXTS, template=st.sampled_from([*TEMPLATES, ECHO]), limit=st.integers(50, 80), tokens=st.integers(1, 99))
@settings(max_examples=200)
def test_no_chunk_is_longer_than_the_model_takes(tokenizer, text, template, limit, tokens):
    """Also where it takes fewer tokens than a chunk would have; and then all of the text is read."""
    (prompt,) = Prompter(tokenizer, limit)([text], template, 10_000, chunk_tokens=tokens)
    assert all(len(chunk.ids) <= limit for chunk in prompt.chunks or (prompt,))
    assert _black("".join(chunk.text[slice(*chunk.own)] for chunk in prompt.chunks or (prompt,))) == _black(text)


def test_a_word_that_a_model_cannot_take_whole_is_split(tokenizer):
    """Where there is room for less than a word, chunks end inside of it."""
    text = "antidisestablishmentarianism " * 3
    (bare,) = Prompter(tokenizer)([""], "Context: {text}", 10_000)
    (prompt,) = Prompter(tokenizer, len(bare.ids) + 3)([text], "Context: {text}", 10_000, chunk_tokens=1000)
    assert len(prompt.chunks) > 6
    assert _black("".join(chunk.text[slice(*chunk.own)] for chunk in prompt.chunks)) == _black(text)


def _black(text):
    return "".join(text.split())


def test_a_model_that_takes_no_more_than_the_template_reads_no_chunks(tokenizer):
    with pytest.raises(InputError, match="the model takes 5 tokens, but the template alone takes"):
        Prompter(tokenizer, 5)(["a text " * 9], "A template of some length: {text}", 10_000, chunk_tokens=9)


def _last_copy(rendered, template):
    length = (len(rendered) - len(template.replace("{text}", ""))) // template.count("{text}")
    end = len(rendered) - len(template.rpartition("{text}")[2])
    return rendered[end - length : end]


def test_chunks_end_between_words_and_are_about_equal(tokenizer):
    text = " ".join(f"word{number}" for number in range(200))
    (prompt,) = Prompter(tokenizer)([text], "Context: {text}", 10_000, chunk_tokens=100)
    own = prompt.span[1] - prompt.span[0]
    sizes = [chunk.span[1] - chunk.span[0] for chunk in prompt.chunks]
    assert len(sizes) == -(-own // 100)
    assert max(sizes) - min(sizes) < 20
    words = [chunk.text.removeprefix("Context: ").split() for chunk in prompt.chunks]
    assert [word for some in words for word in some] == text.split()


@given(text=TEXTS, room=st.integers(2, 40))
def test_both_copies_are_cut_alike(tokenizer, text, room):
    prompter = Prompter(tokenizer)
    (whole,), (bare,) = prompter([text], ECHO, 10_000), prompter([""], ECHO, 10_000)
    limit = len(bare.ids) + room
    (prompt,) = prompter([text], ECHO, limit)
    assert len(prompt.ids) <= limit
    kept = prompt.text[len("Rewrite: ") :].rpartition(", rewritten: ")[2]
    assert prompt.text == ECHO.replace("{text}", kept)
    assert text.startswith(kept)
    assert (prompt.tokens_cut > 0) == (kept != text) == (len(whole.ids) > limit)
    if prompt.tokens_cut:
        assert len(prompt.ids) > limit - 12


@given(text=TEXTS.filter(lambda text: "\ufdd0" not in text))  # which hypothesis finds in the source
def test_the_placeholder_is_one_token_before_the_text(tokenizer, text):
    prompter = Prompter(tokenizer)
    (prompt,) = prompter([text], 'This : {pst} "{text}" means:"', 10_000)
    (without,) = prompter([text], 'This :  "{text}" means:"', 10_000)
    assert prompt.placeholder is not None
    assert prompt.ids[prompt.placeholder] == 0
    assert prompt.text[slice(*prompt.offsets[prompt.placeholder])] == "▮"
    assert prompt.placeholder < prompt.span[0]
    assert without.placeholder is None
    assert prompt.text == f'This : ▮ "{text}" means:"'
    assert tokenizer.decode(prompt.ids[prompt.placeholder + 1 :]) == f' "{text}" means:"'


def test_a_text_with_the_noncharacter_of_the_placeholder(tokenizer):
    with pytest.raises(InputError, match="text 1 holds the noncharacter U\\+FDD0"):
        Prompter(tokenizer)(["fine", "a\ufdd0b"], "{pst} {text}", 100)
    assert Prompter(tokenizer)(["a\ufdd0b"], "{text}", 100)[0].tokens_cut == 0


def test_no_room_for_any_text(tokenizer):
    prompter = Prompter(tokenizer)
    (bare,) = prompter([""], TEMPLATES[1], 10_000)
    with pytest.raises(InputError, match=f"max_tokens is 5, but the template alone takes {len(bare.ids)} tokens"):
        prompter(["hello there, this is long"], TEMPLATES[1], 5)


def test_a_lone_surrogate_is_named(tokenizer):
    with pytest.raises(InputError, match=r"text 1 holds a lone surrogate \(U\+D83D\) at character 2"):
        Prompter(tokenizer)(["fine", "hm\ud83d"], "{text}", 100)


def test_an_empty_text_in_an_empty_template_is_one_token(tokenizer, bare_tokenizer):
    (with_bos,) = Prompter(tokenizer)([""], "{text}", 10)
    (without,) = Prompter(bare_tokenizer)([""], "{text}", 10)
    assert with_bos.ids == (tokenizer.bos_token_id,)
    assert without.ids == (bare_tokenizer.eos_token_id,)
    assert without.span[0] == without.span[1]
    bare_tokenizer_without_eos = type(bare_tokenizer)(tokenizer_object=bare_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="needs a template"):
        Prompter(bare_tokenizer_without_eos)([""], "{text}", 10)


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=8)
    backend.enable_truncation(5)
    before = backend.to_str(), backend.encode_special_tokens
    (_, long) = Prompter(tokenizer)(["a<|im_end|>", "b" * 50], "{text}", 20)
    assert len(long.ids) > 8
    assert (backend.to_str(), backend.encode_special_tokens) == before
    backend.no_padding()
    backend.no_truncation()
    assert tokenizer("<|im_end|>", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match="Slow gives no character offsets"):
        Prompter(Slow())


def test_no_texts(tokenizer):
    assert Prompter(tokenizer)([], "{text}", 10) == []


def test_a_vocabulary_that_holds_special_tokens_as_pieces_says_so():
    """In a Unigram vocabulary `</s>` is a piece like any other: it would become the EOS token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "abcdef</s> ")]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert Prompter(tokenizer)(["abc"], "{text}", 10)[0].tokens_cut == 0
    with pytest.raises(InputError, match="text 0 holds '</s>', which this tokenizer can't read as plain text"):
        Prompter(tokenizer)(["abc</s>def"], "{text}", 10)


def test_a_character_cut_before_the_template_is_counted_though_the_span_stays_as_long(tokenizer):
    """The last kept character may merge with the template and count as the text's own: the cut must show."""
    prompter = Prompter(tokenizer)
    template = 'This : "{text}" means:"'
    for text in ("a b c d e f g", 'say "s', "é" * 9, "🙂🙂 x", 'x"y"z"'):
        (whole,) = prompter([text], template, 10_000)
        (bare,) = prompter([""], template, 10_000)
        for limit in range(len(bare.ids) + 1, len(whole.ids)):
            assert prompter([text], template, limit)[0].tokens_cut > 0


@given(text=TEXTS)
def test_the_ids_of_a_text_are_that_text(tokenizer, text):
    prompter = Prompter(tokenizer)
    (prompt,) = prompter([text], "{text}", 10_000)
    assert prompter.decode(prompt.ids) == text  # with the BOS that the tokenizer adds
    assert prompter.decode(prompt.ids[1:]) == text


def test_ids_that_are_no_text(tokenizer):
    prompter = Prompter(tokenizer)
    cat = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert prompter.decode(cat) == "🙂"
    assert prompter.decode([]) == ""
    for ids, message in [
        ([400], "token 400 is not in the model's vocabulary"),
        ([1.0], "a text is a string or a list of token ids, and 1.0 is no id"),
        (["a"], "a text is a string or a list of token ids, and 'a' is no id"),
        ([-1], "token -1 is not"),
        ([2**40], "is not in"),
        ([70, 2], r"token 2 is a special token, <\|im_end\|>"),
        ([70, 0, 71], "token 0 is a special token, <s>"),
        (cat[:2], "do not make whole characters"),
    ]:
        with pytest.raises(InputError, match=message):
            prompter.decode(ids)


def byte_level(trim_offsets=False, normalizer=None, texts=("mot tiếng nói", "return x of it")):
    rules = Tokenizer(models.BPE())
    rules.normalizer = normalizer
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rules.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    rules.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=rules)


def test_white_space_that_begins_a_text_is_its_own():
    prompts = [Prompter(byte_level(trim))(["    return x"], "Text: {text}!", 99)[0] for trim in (False, True)]
    assert prompts[0] == prompts[1]
    first, end = prompts[0].span
    assert prompts[0].text[prompts[0].offsets[first][0] : prompts[0].offsets[end - 1][1]].endswith("    return x")
    tokenizer = byte_level(True)
    Prompter(tokenizer)
    assert tokenizer.backend_tokenizer.post_processor.trim_offsets  # the user's stays as it is


def test_a_cut_within_a_letter_in_two_parts_is_counted_and_loses_no_accent():
    prompter = Prompter(byte_level(normalizer=normalizers.NFC()))
    text = unicodedata.normalize("NFD", "mot tiế")
    (whole,) = prompter([text], "{text}", 99)
    for most in range(1, whole.tokens):
        (cut,) = prompter([text], "{text}", most)
        assert cut.tokens <= most
        assert cut.tokens_cut > 0
        kept = unicodedata.normalize("NFC", cut.text)
        assert unicodedata.normalize("NFC", text).startswith(kept), (most, kept)


def test_ids_of_a_text_that_begins_with_spaces():
    """Llama 2's tokenizer puts a space in front where there is none, and its decoder takes one off in any case."""
    alphabet = {piece: number for number, piece in enumerate(["▁", *"-item", "<unk>"])}
    rules = Tokenizer(models.BPE(vocab=alphabet, merges=[], unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rules.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=rules))
    for text in ("item", " item", "  - item", "   "):
        ids = rules.encode(text, add_special_tokens=False).ids
        assert rules.encode(prompter.decode(ids), add_special_tokens=False).ids == ids, text


def test_ids_where_the_vocabulary_has_no_small_letters():
    rules = Tokenizer(models.BPE(vocab={"A": 0, "C": 1, "<s>": 2}, merges=[]))
    rules.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>"))
    assert prompter.decode([2, 0, 1]) == prompter.decode([0, 1])
