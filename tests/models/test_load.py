"""Model folders: what is missing is said before anything is loaded."""

import shutil

import pytest
import torch

from fedloom.errors import ModelError
from fedloom.models.load import fingerprint, load_backbone, load_tokenizer


@pytest.fixture
def copy(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def test_a_missing_folder():
    with pytest.raises(ModelError, match=r"'\./nowhere' is not a folder"):
        load_backbone("./nowhere", pad_token_id=0)


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in"):
        load_backbone(str(copy), pad_token_id=0)


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is pickled and is not read"):
        load_backbone(str(copy), pad_token_id=0)


def test_a_folder_without_a_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer in"):
        load_tokenizer(str(copy))


def test_truncated_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load the model"):
        load_backbone(str(copy), pad_token_id=0)


def test_a_hub_name_without_a_network():
    with pytest.raises(ModelError, match="nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_the_backbone_is_frozen_and_the_classification_head_seeded(model_folder):
    heads = [
        load_backbone(str(model_folder), pad_token_id=0, classes=("a", "b"), seed=seed).score.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_fingerprint_changes_with_the_weights(copy):
    before = fingerprint(str(copy))
    assert fingerprint(str(copy)) == before
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint(str(copy)) != before
