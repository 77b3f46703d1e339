"""Lists of stages: their texts, what they promise, and lists that cannot be."""

import re

import numpy as np
import pytest
import torch

from fedloom.wire.codecs import PRESETS, STAGES, pipeline

TEXTS = {
    "int4": "int4:stochastic,block=64|zstd",
    "int8": "int8:stochastic,block=256|zstd",
    "small": "ternary:stochastic,block=64|zstd",
    "smallest": "sign:block=256|zstd",
    "int4:nearest|zstd": "int4:nearest,block=64|zstd",
    " top_k:.1 | int4 : block=32 ": "top_k:0.1|int4:stochastic,block=32",
    "random_k:1e-3": "random_k:0.001",
    "low_rank:2|int8|zstd:level=3": "low_rank:2|int8:stochastic,block=256|zstd:level=3",
    "bf16": "bf16",
    "nf4": "nf4:block=64",
}


@pytest.mark.parametrize(("text", "canonical"), TEXTS.items())
def test_a_text_has_one_canonical_form(text, canonical):
    assert str(pipeline(text)) == canonical
    assert pipeline(canonical) == pipeline(text) == pipeline(canonical.split("|"))


def test_a_preset_is_a_text_and_a_stage_is_an_entry_of_a_list():
    assert str(pipeline(["int4"])) == "int4:stochastic,block=64"
    assert all(str(pipeline(name)) == str(pipeline(list(own))) for name, own in PRESETS.items())


REFUSED = {
    "int5": "there is no stage 'int5' of a codec: did you mean 'int8'?",
    "gzip": "there is no stage 'gzip' of a codec: there are top_k",
    "": "a codec needs a stage",
    "int4|": "there is no stage '' of a codec",
    "int4:fast": "int4 has no option 'fast'",
    "int4:block=3": "'int4:block=3': block must be a whole number from 8 to 65536",
    "int4:block=1e2": "block must be a whole number",
    "int4:block=8,block=8": "says block= twice",
    "int4:nearest,stochastic": "says nearest and stochastic: leave one of them out",
    "bf16:block=8": "bf16 has no option 'block=8'",
    "top_k": "'top_k' lacks its share, as in top_k:share",
    "top_k:0": "'top_k:0': the share must be above 0 and at most 1, as in 0.1",
    "top_k:1.5": "the share must be above 0",
    "top_k:nan": "the share must be above 0",
    "random_k:-1": "the share must be above 0",
    "low_rank:0": "'low_rank:0': rank must be a whole number from 1 to 1024",
    "low_rank:two": "rank must be a whole number",
    "zstd:level=30": "level must be a whole number from 1 to 19",
    "zstd|int4": "int4 is a quantiser or cast and stands before zstd: put it there",
    "int4|top_k:0.1": "top_k is a stage that keeps fewer numbers and stands before int4: put it there",
    "int4|int8": "int4 and int8 are both a quantiser or cast: leave one of them out",
    "int4|bf16": "are both a quantiser or cast",
    "top_k:0.1|random_k:0.1": "are both a stage that keeps fewer numbers",
    "zstd|zstd": "are both an entropy stage",
    "small|zstd": "there is no stage 'small' of a codec: it is a preset, which stands alone",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_one_clear_sentence(text):
    with pytest.raises(ValueError, match=re.escape(REFUSED[text])) as found:
        pipeline(text)
    assert "\n" not in str(found.value)


def test_an_entry_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="4 is no text of a stage, such as 'int4'"):
        pipeline([4])


@pytest.mark.parametrize(
    ("text", "unbiased", "lossless", "sums"),
    [
        ("zstd", True, True, False),
        ("int4", True, False, False),
        ("small", True, False, False),
        ("smallest", False, False, False),
        ("int4:nearest|zstd", False, False, False),
        ("bf16", False, False, False),
        ("random_k:0.5", True, False, True),
        ("random_k:0.5|int4", True, False, False),
        ("top_k:0.5|int4", False, False, False),
        ("low_rank:2|int8", False, False, False),
    ],
)
def test_what_a_codec_promises(text, unbiased, lossless, sums):
    codec = pipeline(text)
    assert (codec.unbiased, codec.lossless, codec.sums) == (unbiased, lossless, sums)


def test_sums_of_encodings_with_one_seed_are_encodings_of_sums():
    codec = pipeline(["random_k:0.25"])
    own = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    coded = [
        codec.encode(["x"], [t], lambda name: np.random.default_rng(1)) for t in (*own, own.sum(0))
    ]
    heads = {data[:8] for data in coded}
    values = [np.frombuffer(data[8:-4], np.float32) for data in coded]
    assert len(heads) == 1
    assert np.allclose(values[0] + values[1] + values[2], values[3], atol=1e-5)


def test_every_stage_has_a_name_of_its_own():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
